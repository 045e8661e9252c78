# MLflow is a mirror of the files, and every target ends here. Local rules: on a cluster only the submitting host
# writes the store, for a shared file system corrupts sqlite.


rule track_finetune:
    input:
        weights="results/runs/{run}/weights",
        metrics="results/runs/{run}/metrics.jsonl",
        record="results/runs/{run}/run.json",
    output:
        done="results/runs/{run}/tracked/finetune.json",
        plot=report(
            "results/runs/{run}/tracked/loss.svg",
            caption="../report/loss.rst",
            category="Training",
            labels={"run": "{run}", "shown": "loss curve"},
        ),
    log:
        "logs/track/{run}.finetune.log",
    localrule: True
    params:
        store=options.track_options(PROJECT),
    shell:
        "llmpipe track results/runs/{wildcards.run} {params.store} --output {output.done} --log {log}"


rule track:
    input:
        by("name stage", outputs.tracked_files),
    output:
        "results/{kind}/{name}/tracked/{stage}.json",
    log:
        "logs/track/{kind}.{name}.{stage}.log",
    wildcard_constraints:
        kind="runs|models",
        stage="convert|verify|evaluate|export",
    localrule: True
    params:
        store=options.track_options(PROJECT),
    shell:
        "llmpipe track results/{wildcards.kind}/{wildcards.name} {params.store} --output {output} --log {log}"
