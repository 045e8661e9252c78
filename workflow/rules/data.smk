# The text: tokens are a model's, because its tokenizer makes them.


rule tokenize:
    input:
        corpus="config/corpora/{corpus}.yaml",
        files=by("corpus", project.corpus_files, there),
        tokenizer="results/models/{model}/checkpoint",
    output:
        bin="results/models/{model}/corpora/{corpus}.bin",
        idx="results/models/{model}/corpora/{corpus}.idx",
        manifest="results/models/{model}/corpora/{corpus}.manifest.json",
    log:
        "logs/tokenize/{model}.{corpus}.log",
    benchmark:
        "logs/tokenize/{model}.{corpus}.benchmark.tsv"
    threads: 8
    params:
        prefix=subpath(output.bin, strip_suffix=".bin"),
    shell:
        "llmpipe tokenize {input.corpus} --tokenizer {input.tokenizer} --output {params.prefix}"
        " --workers {threads} --log {log}"
