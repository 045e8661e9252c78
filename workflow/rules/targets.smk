# `snakemake finetune_llama2_7b`: a target for each file in config/runs/ and config/models/.


for name in configs.names("runs"):
    for stage in ("finetune", "evaluate", "export"):

        rule:
            name:
                f"{stage}_{name}"
            input:
                f"results/runs/{name}/tracked/{stage}.json",
                checked(inputs.check_run, name),
            localrule: True

    rule:
        name:
            f"report_{name}"
        input:
            f"results/runs/{name}/report.html",
            checked(inputs.check_run, name),
        localrule: True


for name in configs.names("models"):
    for stage in ("convert", "verify"):

        rule:
            name:
                f"{stage}_{name}"
            input:
                f"results/models/{name}/tracked/{stage}.json",
                checked(inputs.source, name),
            localrule: True
