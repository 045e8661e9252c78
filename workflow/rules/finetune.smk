# The training. What config/runs/{run}.yaml says arrives in the inputs and in `options`, so editing its `evaluate:`
# does not train again; editing a recipe trains its runs again, and no others.


rule finetune:
    input:
        recipe=by("run", configs.recipe_file),
        shards=by("run", outputs.rank_files),
        # Training cannot start before both cards say pass.
        cards=by("run", outputs.cards),
        data=by("run", outputs.dataset_files),
    output:
        weights=directory("results/runs/{run}/weights"),
        metrics="results/runs/{run}/metrics.jsonl",
        record="results/runs/{run}/run.json",
    log:
        "logs/finetune/{run}.log",
    benchmark:
        "logs/finetune/{run}.benchmark.tsv"
    threads: by("run", launch.resource, "threads")
    resources:
        # One launcher a node, which starts that node's ranks: see llmpipe.launch.resources. `gpu` is the total: on one
        # machine `--resources gpu=8` counts it, so that two trainings do not meet on a GPU. How long a job may take is the
        # profile's: a training goes on in the next one.
        mem_mb=by("run", needs.finetune_memory),
        mpi=by("run", launch.resource, "mpi"),
        nodes=by("run", launch.resource, "nodes"),
        tasks=by("run", launch.resource, "tasks"),
        tasks_per_gpu=0,
        gpu=by("run", launch.resource, "gpu"),
        slurm_extra=by("run", launch.resource, "slurm_extra"),
    params:
        # Training checkpoints in it are undeclared on purpose: Snakemake deletes outputs
        # before every attempt, and a retry resumes from them.
        folder=subpath(output.record, parent=True),
        options=by("run", options.finetune_options),
    shell:
        "llmpipe finetune {input.recipe} --model {input.shards} --output {params.folder}"
        " {params.options} --threads {threads} --log {log}"
