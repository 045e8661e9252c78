rule finetune:
    input:
        # Changing any of these retrains the run, and no other.
        recipe=of_run(project.recipe_file),
        configs=of_run(project.config_files),
        shards=of_run(project.rank_files),
        # Training cannot start before both cards say pass.
        cards=of_run(project.cards),
        data=of_run(project.dataset_files),
    output:
        weights=directory("results/runs/{run}/weights"),
        metrics="results/runs/{run}/metrics.jsonl",
        record="results/runs/{run}/run.json",
    log:
        "logs/finetune/{run}.log",
    benchmark:
        "logs/finetune/{run}.benchmark.tsv"
    threads: resource("threads")
    resources:
        # One launcher a node starts that node's ranks; the numbers are tested against the Slurm plugin.
        mpi=resource("mpi"),
        nodes=resource("nodes"),
        tasks=resource("tasks"),
        tasks_per_gpu=0,
        gpu=resource("gpu"),
        slurm_extra=resource("slurm_extra"),
    params:
        # Training checkpoints in it are undeclared on purpose: Snakemake deletes outputs
        # before every attempt, and a retry resumes from them.
        folder=subpath(output.record, parent=True),
        options=of_run(project.finetune_options),
    shell:
        "llmpipe finetune {input.recipe} --model {input.shards} --output {params.folder}"
        " {params.options} --log {log}"
