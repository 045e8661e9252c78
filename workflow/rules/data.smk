# The text: tokens are a model's, because its tokenizer makes them. A corpus with `parts:` is tokenized by as many jobs.
# Chats, and tokens with labels, also have roles; the rules that make them are the same otherwise.
WHOLE, PARTED = (configs.corpora(parted, roles=False) for parted in (False, True))
CHATS, PARTED_CHATS = (configs.corpora(parted, roles=True) for parted in (False, True))


rule tokenize:
    input:
        corpus="config/corpora/{corpus}.yaml",
        files=by("corpus", inputs.corpus_files, there),
        tokenizer="results/models/{model}/checkpoint",
    output:
        bin="results/models/{model}/corpora/{corpus}.bin",
        idx="results/models/{model}/corpora/{corpus}.idx",
        manifest="results/models/{model}/corpora/{corpus}.manifest.json",
    log:
        "logs/tokenize/{model}.{corpus}.log",
    benchmark:
        "logs/tokenize/{model}.{corpus}.benchmark.tsv"
    wildcard_constraints:
        corpus=configs.one_of(WHOLE),
    threads: needs.WORKERS
    resources:
        mem_mb=needs.TOKENIZE,
        runtime=minutes("corpus", needs.tokenize_minutes),
    params:
        prefix=subpath(output.bin, strip_suffix=".bin"),
    shell:
        "llmpipe tokenize {input.corpus} --tokenizer {input.tokenizer} --output {params.prefix}"
        " --workers {threads} --log {log}"


use rule tokenize as tokenize_chat with:
    output:
        bin="results/models/{model}/corpora/{corpus}.bin",
        idx="results/models/{model}/corpora/{corpus}.idx",
        manifest="results/models/{model}/corpora/{corpus}.manifest.json",
        roles="results/models/{model}/corpora/{corpus}.roles.bin",
        roles_idx="results/models/{model}/corpora/{corpus}.roles.idx",
    wildcard_constraints:
        corpus=configs.one_of(CHATS),


rule tokenize_part:
    input:
        corpus="config/corpora/{corpus}.yaml",
        files=by("corpus", inputs.corpus_files, there),
        tokenizer="results/models/{model}/checkpoint",
    output:
        bin=temp("results/models/{model}/corpora/{corpus}.part-{part}-of-{parts}.bin"),
        idx=temp("results/models/{model}/corpora/{corpus}.part-{part}-of-{parts}.idx"),
        manifest=temp(
            "results/models/{model}/corpora/{corpus}.part-{part}-of-{parts}.manifest.json"
        ),
    log:
        "logs/tokenize/{model}.{corpus}.part-{part}-of-{parts}.log",
    benchmark:
        "logs/tokenize/{model}.{corpus}.part-{part}-of-{parts}.benchmark.tsv"
    wildcard_constraints:
        corpus=configs.one_of(PARTED),
        part="[0-9]+",
        parts="[0-9]+",
    threads: needs.WORKERS
    resources:
        mem_mb=needs.TOKENIZE,
        runtime=minutes("corpus", needs.tokenize_minutes),
    params:
        prefix="results/models/{model}/corpora/{corpus}",
    shell:
        "llmpipe tokenize {input.corpus} --tokenizer {input.tokenizer} --output {params.prefix}"
        " --part {wildcards.part}/{wildcards.parts} --workers {threads} --log {log}"


use rule tokenize_part as tokenize_chat_part with:
    output:
        bin=temp("results/models/{model}/corpora/{corpus}.part-{part}-of-{parts}.bin"),
        idx=temp("results/models/{model}/corpora/{corpus}.part-{part}-of-{parts}.idx"),
        manifest=temp(
            "results/models/{model}/corpora/{corpus}.part-{part}-of-{parts}.manifest.json"
        ),
        roles=temp(
            "results/models/{model}/corpora/{corpus}.part-{part}-of-{parts}.roles.bin"
        ),
        roles_idx=temp(
            "results/models/{model}/corpora/{corpus}.part-{part}-of-{parts}.roles.idx"
        ),
    wildcard_constraints:
        corpus=configs.one_of(PARTED_CHATS),
        part="[0-9]+",
        parts="[0-9]+",


rule merge_parts:
    input:
        by("model corpus", outputs.part_files),
    output:
        bin="results/models/{model}/corpora/{corpus}.bin",
        idx="results/models/{model}/corpora/{corpus}.idx",
        manifest="results/models/{model}/corpora/{corpus}.manifest.json",
    log:
        "logs/tokenize/{model}.{corpus}.merge.log",
    benchmark:
        "logs/tokenize/{model}.{corpus}.merge.benchmark.tsv"
    wildcard_constraints:
        corpus=configs.one_of(PARTED),
    resources:
        mem_mb=needs.PROCESS,
        runtime=minutes("corpus", needs.merge_minutes),
    params:
        parts=by("model corpus", outputs.part_prefixes),
        prefix=subpath(output.bin, strip_suffix=".bin"),
    shell:
        "llmpipe merge {params.parts} --output {params.prefix} --remove-rejects --log {log}"


use rule merge_parts as merge_chat_parts with:
    output:
        bin="results/models/{model}/corpora/{corpus}.bin",
        idx="results/models/{model}/corpora/{corpus}.idx",
        manifest="results/models/{model}/corpora/{corpus}.manifest.json",
        roles="results/models/{model}/corpora/{corpus}.roles.bin",
        roles_idx="results/models/{model}/corpora/{corpus}.roles.idx",
    wildcard_constraints:
        corpus=configs.one_of(PARTED_CHATS),
