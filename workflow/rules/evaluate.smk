# What the training did: the run beside the checkpoint it started from, then the trained model for the world.


rule evaluate:
    input:
        weights="results/runs/{run}/weights",
        record="results/runs/{run}/run.json",
        data=by("run", outputs.dataset_files),
        tasks=by("run", inputs.task_files),
        reference=by("run", outputs.checkpoint),
    output:
        table="results/runs/{run}/evaluate/table.json",
        text="results/runs/{run}/evaluate/table.md",
        page=report(
            "results/runs/{run}/evaluate/table.html",
            caption="../report/evaluate.rst",
            category="Evaluation",
            labels={"run": "{run}", "shown": "before and after"},
        ),
    log:
        "logs/evaluate/{run}.log",
    benchmark:
        "logs/evaluate/{run}.benchmark.tsv"
    threads: by("run", options.evaluate_threads)
    resources:
        mem_mb=by("run", needs.evaluate_memory),
        runtime=minutes("run", needs.evaluate_minutes),
        nodes=1,
        gpu=by("run", options.evaluate_gpus),
    params:
        folder=subpath(output.table, parent=True),
        options=by("run", options.evaluate_options),
    shell:
        "llmpipe evaluate results/runs/{wildcards.run} --reference {input.reference}"
        " --output {params.folder} {params.options} --log {log}"


rule export:
    input:
        weights="results/runs/{run}/weights",
        record="results/runs/{run}/run.json",
        table="results/runs/{run}/evaluate/table.json",
    output:
        directory("results/runs/{run}/export"),
    log:
        "logs/export/{run}.log",
    benchmark:
        "logs/export/{run}.benchmark.tsv"
    threads: 8
    resources:
        mem_mb=by("run", needs.export_memory),
        runtime=minutes("run", needs.export_minutes),
    shell:
        "llmpipe export results/runs/{wildcards.run} --output {output} --log {log}"
