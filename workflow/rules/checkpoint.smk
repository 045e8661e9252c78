# The model: source → checkpoint → rank files, each compared with what it was made from before anything else may use it.


# For a source of the kind hf://. A local rule: the nodes of a cluster often reach no network.
rule download:
    output:
        directory("results/models/{model}/source"),
    log:
        "logs/download/{model}.log",
    benchmark:
        "logs/download/{model}.benchmark.tsv"
    localrule: True
    params:
        source=by("model", inputs.hub_source),
    shell:
        "llmpipe download {params.source} --output {output} --log {log}"


rule convert:
    input:
        source=by("model", inputs.source, there),
    output:
        directory("results/models/{model}/checkpoint"),
    log:
        "logs/convert/{model}.log",
    benchmark:
        "logs/convert/{model}.benchmark.tsv"
    resources:
        mem_mb=needs.PROCESS,
        runtime=minutes("model", needs.convert_minutes),
    params:
        options=by("model", options.convert_options),
    shell:
        "llmpipe convert {input.source} --output {output} {params.options} --log {log}"


rule verify:
    input:
        checkpoint="results/models/{model}/checkpoint",
        source=by("model", inputs.source, there),
    output:
        card="results/models/{model}/verify.json",
        text="results/models/{model}/verify.md",
        page=report(
            "results/models/{model}/verify.html",
            caption="../report/verify.rst",
            category="Verification",
            labels={"model": "{model}", "compared": "checkpoint with its source"},
        ),
    log:
        "logs/verify/{model}.log",
    benchmark:
        "logs/verify/{model}.benchmark.tsv"
    threads: 8
    resources:
        mem_mb=by("model", needs.verify_memory),
        runtime=minutes("model", needs.model_minutes),
    shell:
        "llmpipe verify {input.checkpoint} --reference {input.source} --output {output.card} --log {log}"


rule shard:
    input:
        checkpoint="results/models/{model}/checkpoint",
        card="results/models/{model}/verify.json",
    output:
        directory("results/models/{model}/tp{tp}-pp{pp}"),
    log:
        "logs/shard/{model}.tp{tp}-pp{pp}.log",
    benchmark:
        "logs/shard/{model}.tp{tp}-pp{pp}.benchmark.tsv"
    resources:
        mem_mb=needs.PROCESS,
        runtime=minutes("model", needs.model_minutes),
    params:
        stages=by("pp", options.stage_options),
    shell:
        "llmpipe shard {input.checkpoint} --tp {wildcards.tp} {params.stages} --output {output} --log {log}"


rule verify_shards:
    input:
        shards="results/models/{model}/tp{tp}-pp{pp}",
        checkpoint="results/models/{model}/checkpoint",
    output:
        card="results/models/{model}/tp{tp}-pp{pp}.verify.json",
        text="results/models/{model}/tp{tp}-pp{pp}.verify.md",
        page=report(
            "results/models/{model}/tp{tp}-pp{pp}.verify.html",
            caption="../report/verify.rst",
            category="Verification",
            labels={
                "model": "{model}",
                "compared": "tp{tp}-pp{pp} with the checkpoint",
            },
        ),
    log:
        "logs/verify/{model}.tp{tp}-pp{pp}.log",
    benchmark:
        "logs/verify/{model}.tp{tp}-pp{pp}.benchmark.tsv"
    threads: 8
    resources:
        mem_mb=by("model", needs.whole_memory),
        runtime=minutes("model", needs.model_minutes),
    shell:
        "llmpipe verify {input.shards} --reference {input.checkpoint} --output {output.card} --log {log}"
