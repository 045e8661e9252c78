# A page on each run, to read and to mail; it also stands in Snakemake's own report. No local rule: to tell how full the
# sequences are, it packs all chats of the run's data.


rule report:
    input:
        record="results/runs/{run}/run.json",
        metrics="results/runs/{run}/metrics.jsonl",
        table="results/runs/{run}/evaluate/table.json",
        export="results/runs/{run}/export",
    output:
        report(
            "results/runs/{run}/report.html",
            caption="../report/run.rst",
            category="Runs",
            labels={"run": "{run}", "shown": "the whole run on a page"},
        ),
    log:
        "logs/report/{run}.log",
    resources:
        mem_mb=by("run", needs.report_memory),
        runtime=minutes("run", needs.report_minutes),
    shell:
        "llmpipe report results/runs/{wildcards.run} --output {output} --log {log}"
