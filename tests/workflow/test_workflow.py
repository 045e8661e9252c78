"""The workflow in a user's project folder: the right jobs, mistakes told, nothing made twice."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from click.testing import CliRunner
from snakemake_help import commands, job_counts, resources_of
from standins import PARAMS, meta_weights

from llmpipe.cli import group
from llmpipe.config import Model
from llmpipe.families import named_size
from llmpipe.yaml_file import load

ROOT = Path(__file__).parents[2]
Snakemake = Callable[..., CompletedProcess[str]]
STAGES = ("convert", "verify", "tokenize", "shard", "verify_shards", "finetune", "track_finetune")
ONE_NODE = "mpi=, nodes=1, tasks=1, tasks_per_gpu=0, gpu=8, slurm_extra=--gpus-per-node=8 --signal=TERM@120\n"
FOUR_NODES = "mpi=srun, nodes=4, tasks=4, tasks_per_gpu=0, gpu=32, slurm_extra=--gpus-per-node=8 --signal=TERM@120\n"

MEGABYTES_AND_MINUTES = {
    "llama2_7b": (239205, 6429, 39),
    "llama2_13b": (402416, 7807, 48),
    "llama2_70b": (512353, 14268, 122),
}


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(
    ("model", "layout", "resources"),
    [
        ("llama2_7b", "--nodes 1 --gpus-per-node 8 --tp 1 --pp 1 --dp 8", ONE_NODE),
        ("llama2_13b", "--nodes 1 --gpus-per-node 8 --tp 2 --pp 1 --dp 4", ONE_NODE),
        ("llama2_70b", "--nodes 4 --gpus-per-node 8 --tp 8 --pp 4 --dp 1", FOUR_NODES),
    ],
)
def test_slurm_dry_run_prints_the_right_jobs(model: str, layout: str, resources: str, snakemake: Snakemake) -> None:
    done = snakemake("--profile", "slurm", "-n", "-p", f"finetune_{model}")
    assert done.returncode == 0, done.stdout
    assert job_counts(done.stdout) == dict.fromkeys([*STAGES, f"finetune_{model}"], 1)
    finetune = next(line for line in commands(done.stdout) if line.startswith("llmpipe finetune"))
    ranks = f"tp{layout.split()[5]}-pp{layout.split()[7]}"
    assert f"--model results/models/{model}/{ranks} --output results/runs/{model} " in finetune
    assert f" {layout} --micro-batch 1 --device cuda " in finetune
    assert " --threads 64 " in finetune
    assert resources in done.stdout
    asked = resources_of(done.stdout)
    assert [rule for rule, told in asked.items() if re.search("gpu=[1-9]", told)] == ["finetune"]
    # In closed form in tests/test_needs.py. A training goes on in the next job, so its time is the profile's.
    finetune_memory, verify_memory, minutes = MEGABYTES_AND_MINUTES[model]
    assert f" mem_mb={finetune_memory}, " in f" {asked['finetune']}" and "runtime=1440, " in asked["finetune"]
    assert f" mem_mb={verify_memory}, " in f" {asked['verify']}" and f" runtime={minutes}" in asked["verify"]
    assert all("mem_mb=" in asked[rule] and "runtime=" in asked[rule] for rule in STAGES[:-1])


@pytest.mark.usefixtures("inputs")
def test_a_job_that_failed_asks_for_more_minutes(snakemake: Snakemake, tmp_path: Path) -> None:
    """As it has to after a time limit."""
    (tmp_path / "bin/llmpipe").write_text("#!/bin/sh\nexit 1\n")
    done = snakemake("--cores", "all", "--retries", "2", "convert_llama2_70b")
    assert done.returncode == 1
    *_, first = MEGABYTES_AND_MINUTES["llama2_70b"]
    assert re.findall(r"runtime=(\d+)", done.stdout) == [str(first * tries) for tries in (1, 2, 3)]


@pytest.mark.usefixtures("inputs")
def test_the_profile_can_name_the_kind_of_gpu(project: Path, snakemake: Snakemake) -> None:
    """By lines of its comments, which Slurm wants to agree: tests/cluster/test_slurm_gpus.py."""
    shipped = (project / "slurm/config.yaml").read_text()
    profile, found = re.subn(r"(?m)^( +)# (gpu_model: |slurm_extra: |evaluate:| +gpu_model: )", r"\1\2", shipped)
    assert found == 4  # two of finetune; evaluate and its own
    (project / "slurm").unlink()
    (project / "slurm").mkdir()
    (project / "slurm/config.yaml").write_text(profile)
    asked = resources_of(snakemake("--profile", "slurm", "-n", "evaluate_llama2_70b").stdout)
    told = {rule: re.findall(r"\b(?:gpu|gpu_model|slurm_extra)=[^,]+", each) for rule, each in asked.items()}
    kind = "--gpus-per-node=h100:8 --signal=TERM@120"
    assert sorted(told.pop("finetune")) == ["gpu=32", "gpu_model=h100", f"slurm_extra={kind}"]
    assert sorted(told.pop("evaluate")) == ["gpu=8", "gpu_model=h100"]
    assert not any(told.values())


@pytest.mark.usefixtures("inputs")
def test_uneven_stages_reach_their_rank_files(project: Path, snakemake: Snakemake) -> None:
    run = project / "config/runs/llama2_7b.yaml"
    run.write_text(re.sub(r"(?m)^  pp: .*\n  pp_layers: .*", "  pp: 2\n  pp_layers: [15, 17]", run.read_text()))
    done = snakemake("-n", "-p", "finetune_llama2_7b")
    assert done.returncode == 0, done.stdout
    told = "\n".join(commands(done.stdout))
    folder = "results/models/llama2_7b/tp1-pp2-layers15.17"
    assert f" --tp 1 --pp 2 --pp-layers 15,17 --output {folder} " in told
    assert f"llmpipe verify {folder} " in told and f"--model {folder} " in told and " --pp-layers 15,17 " in told


def test_shipped_model_fits_real_weights(tmp_path: Path) -> None:
    meta_weights(tmp_path / "weights", "llama2_7b")
    done = CliRunner().invoke(
        group, ["convert", str(tmp_path / "weights"), "--output", "out", "--shape", "llama2_7b", "--dry-run"]
    )
    assert done.exit_code == 0, done.exception
    assert "291 tensors, 6,738,415,616 parameters" in done.stdout  # what transformers counts for Llama 2 7B


@pytest.mark.parametrize("name", PARAMS)
def test_shipped_models_have_the_sizes_of_meta(name: str) -> None:
    shape = named_size(load(Model, ROOT / "config/models" / f"{name}.yaml").shape or "")
    _, params = PARAMS[name]
    assert (shape.hidden, shape.num_layers, shape.num_heads) == (params["dim"], params["n_layers"], params["n_heads"])
    assert shape.num_kv_heads == params.get("n_kv_heads", params["n_heads"])
    # As in Meta's llama/model.py, FeedForward.
    hidden = int(params.get("ffn_dim_multiplier", 1) * int(2 * 4 * params["dim"] / 3))
    assert shape.ffn == -(-hidden // params["multiple_of"]) * params["multiple_of"]


def test_missing_source_says_which_file_to_edit(project: Path, snakemake: Snakemake) -> None:
    done = snakemake("-n", "finetune_llama2_7b")
    assert done.returncode == 1
    assert (
        "the weights of model llama2_7b are not there: weights/llama-2-7b does not exist. Edit `source:` in"
        " config/models/llama2_7b.yaml: it takes a directory with Meta's files (consolidated.*.pth, params.json,"
        " tokenizer.model), a Hugging Face directory (config.json, *.safetensors, tokenizer.model) or hf://ORG/NAME@REV"
        in done.stdout
    )
    (project / "weights/llama-2-7b").mkdir(parents=True)
    done = snakemake("-n", "finetune_llama2_7b")
    assert done.returncode == 1
    assert (
        "the text of corpus text is not there: data/corpus.jsonl does not exist. Edit `files:` in"
        " config/corpora/text.yaml: it takes .jsonl, .json, .txt (also .gz, .zst), .parquet or .arrow files, or"
        " directories of them" in done.stdout
    )


@pytest.mark.usefixtures("inputs")
def test_wrong_config_is_told_and_stops_its_own_run_only(project: Path, snakemake: Snakemake) -> None:
    run = project / "config/runs/llama2_13b.yaml"
    run.write_text(run.read_text().replace("recipe:", "recipee:"))
    assert snakemake("-n", "export_llama2_7b").returncode == 0
    done = snakemake("-n", "export_llama2_13b")
    assert done.returncode == 1
    assert "config/runs/llama2_13b.yaml: unknown key recipee: did you mean 'recipe'?" in done.stdout
    done = snakemake("-n", "--config", "runs=[llama2_7c]")
    assert done.returncode == 1
    told = "config/config.yaml names 'llama2_7c', but there is no config/runs/llama2_7c.yaml: did you mean 'llama2_7b'?"
    assert told in done.stdout


def test_targets_for_each_run_and_model(project: Path, snakemake: Snakemake) -> None:
    (project / "config/runs/mine.yaml").write_text("{model: llama2_7b, data: {text: 1}, recipe: llama2}")
    listed = snakemake("--list-target-rules").stdout.split()
    for name in ("llama2_7b", "llama2_13b", "llama2_70b"):
        assert {f"{stage}_{name}" for stage in ("convert", "verify", "finetune", "evaluate", "export")} <= {*listed}
    assert {"finetune_mine", "evaluate_mine", "export_mine", "report_mine"} <= {*listed}
    assert "convert_mine" not in listed


@pytest.mark.usefixtures("inputs")
def test_whole_workflow_with_a_stub(project: Path, snakemake: Snakemake) -> None:
    """Every rule's command is one that the real command line takes, and a change makes again what depends on it."""
    everything = ("-c", "2", "--config", "runs=[llama2_7b, llama2_13b]")
    done = snakemake(*everything)
    assert done.returncode == 0, done.stdout
    assert (project / "results/runs/llama2_13b/tracked/export.json").is_file()
    assert (project / "results/runs/llama2_13b/report.html").is_file()
    assert "Nothing to be done" in snakemake(*everything).stdout

    run = project / "config/runs/llama2_7b.yaml"
    run.write_text(run.read_text().replace("evaluate: [perplexity]", "evaluate: [perplexity, hellaswag]"))
    again = {"evaluate": 1, "export": 1, "report": 1, "track": 2, "project": 1}
    assert job_counts(snakemake("-n", *everything).stdout) == again

    recipe = project / "config/recipes/llama2.yaml"
    (project / "config/recipes/other.yaml").write_text(recipe.read_text())
    assert job_counts(snakemake("-n", *everything).stdout) == again
    run.write_text(run.read_text().replace("recipe: llama2 ", "recipe: other "))
    retrained = {**again, "finetune": 1, "track_finetune": 1}
    assert job_counts(snakemake("-n", *everything).stdout) == retrained
    recipe.write_text(recipe.read_text().replace("steps: 1000", "steps: 2000"))
    twice = {name: 2 * count for name, count in retrained.items()} | {"project": 1}
    assert job_counts(snakemake("-n", *everything).stdout) == twice


@pytest.mark.usefixtures("inputs")
def test_a_corpus_in_parts_is_tokenized_by_as_many_jobs(project: Path, snakemake: Snakemake) -> None:
    corpus = project / "config/corpora/text.yaml"
    corpus.write_text(corpus.read_text().replace("parts: 1 ", "parts: 3 "))
    (project / "config/corpora/other.yaml").write_text("files: [data/corpus.jsonl]\nparts: 2.5\n")  # nobody asks for it
    prefix = "results/models/llama2_7b/corpora/text"
    done = snakemake("-c", "2", "-p", f"{prefix}.bin")
    assert done.returncode == 0, done.stdout
    assert job_counts(done.stdout) == {"convert": 1, "tokenize_part": 3, "merge_parts": 1}
    printed = [shlex.split(line) for line in commands(done.stdout)]
    parts = [f"{prefix}.part-{number}-of-3" for number in (1, 2, 3)]
    assert [words[2:5] for words in printed if words[1] == "merge"] == [parts]
    given = [words[words.index("--part") + 1] for words in printed if words[1] == "tokenize"]
    assert sorted(given) == ["1/3", "2/3", "3/3"]
    assert sorted(path.name for path in (project / prefix).parent.iterdir()) == [
        "text.bin",
        "text.idx",
        "text.manifest.json",
    ]
    assert "Nothing to be done" in snakemake("-c", "2", f"{prefix}.bin").stdout
    corpus.write_text(corpus.read_text().replace("parts: 3 ", "parts: 1 "))
    assert job_counts(snakemake("-n", f"{prefix}.bin").stdout) == {"tokenize": 1}


@pytest.mark.usefixtures("inputs")
def test_chats_have_roles_in_one_job_and_in_parts(project: Path, snakemake: Snakemake) -> None:
    corpus = project / "config/corpora/chats.yaml"
    corpus.write_text("files: [data/corpus.jsonl]\nkind: chat\n")
    run = project / "config/runs/llama2_7b.yaml"
    run.write_text(run.read_text().replace("{text:", "{chats:"))
    made = sorted(f"chats{suffix}" for suffix in (".bin", ".idx", ".manifest.json", ".roles.bin", ".roles.idx"))
    for parts, jobs in ((1, {"tokenize_chat": 1}), (2, {"tokenize_chat_part": 2, "merge_chat_parts": 1})):
        corpus.write_text(f"files: [data/corpus.jsonl]\nkind: chat\nparts: {parts}\n")
        done = snakemake("-c", "2", "--forcerun", *jobs, "--", "results/models/llama2_7b/corpora/chats.roles.idx")
        assert done.returncode == 0, done.stdout
        counts = job_counts(done.stdout)
        assert {name: count for name, count in counts.items() if "chat" in name} == jobs
        assert sorted(path.name for path in (project / "results/models/llama2_7b/corpora").iterdir()) == made
    assert "corpora/chats.roles.bin" in snakemake("-n", "finetune_llama2_7b").stdout


@pytest.mark.usefixtures("inputs")
def test_tokens_with_labels_have_roles(project: Path, snakemake: Snakemake) -> None:
    run = project / "config/runs/llama2_7b.yaml"
    run.write_text(run.read_text().replace("{text:", "{ids:"))
    roles = "results/models/llama2_7b/corpora/ids.roles.bin"
    for labels, there in (("true", True), ("false", False)):
        (project / "config/corpora/ids.yaml").write_text(
            f"files: [data/corpus.jsonl]\nkind: tokens\nlabels: {labels}\nparts: 2\n"
        )
        done = snakemake("-n", "-p", "finetune_llama2_7b")
        assert done.returncode == 0 and (roles in done.stdout) is there, done.stdout
        assert ("ids.part-2-of-2.roles.idx" in done.stdout) is there
    assert " --output results/models/llama2_7b/corpora/ids --remove-rejects " in done.stdout


@pytest.mark.usefixtures("inputs")
def test_a_corpus_of_names_with_stars(project: Path, snakemake: Snakemake) -> None:
    corpus = project / "config/corpora/text.yaml"
    corpus.write_text(corpus.read_text().replace("[data/corpus.jsonl]", '["data/part-*.jsonl"]'))
    done = snakemake("-n", "results/models/llama2_7b/corpora/text.bin")
    assert done.returncode == 1 and "is not there: data/part-*.jsonl does not exist. Edit" in done.stdout
    for number in (1, 2):
        (project / f"data/part-{number}.jsonl").write_text('{"text": "one"}\n')
    done = snakemake("-n", "results/models/llama2_7b/corpora/text.bin")
    assert "data/part-1.jsonl, data/part-2.jsonl" in done.stdout


def test_commands_can_be_copied_from_the_log(project: Path, snakemake: Snakemake, inputs: None) -> None:
    printed = commands(snakemake("-n", "-p", "export_llama2_7b").stdout)
    assert len(printed) == 11
    for line in printed:
        words = shlex.split(line)
        assert words[0] == "llmpipe" and "--log" in words, line
        assert not {"|", "&&", ";", ">", "2>"} & {*words}, f"more than one command: {line}"


MISTAKES = [
    ("recipes/llama2.yaml", "steps:", "stepz:", "recipes/llama2.yaml: unknown key stepz: did you mean 'steps'?"),
    ("runs/llama2_7b.yaml", "recipe: llama2", "recipe: lama2", "no config/recipes/lama2.yaml: did you mean 'llama2"),
    ("runs/llama2_7b.yaml", "{text:", "{texts:", "there is no config/corpora/texts.yaml: did you mean 'text'?"),
    ("runs/llama2_7b.yaml", "tp: 1", "tp: 3", "layout: tp 3 x pp 1 x cp 1 x dp -1 does not make 8 processes"),
    (
        "runs/llama2_7b.yaml", "8           # processes on each, one a GPU\n  tp: 1", "24\n  tp: 3",
        "tp 3 does not divide 32 query heads and 32 KV heads",
    ),
    ("models/llama2_7b.yaml", "llama-2-7b", "nope", "weights/nope does not exist. Edit `source:`"),
    ("models/llama2_7b.yaml", "shape: llama2_7b", "shape: llama2_7", "shape 'llama2_7' is in no family's size table"),
    ("corpora/text.yaml", "text_key:", "textkey:", "corpora/text.yaml: unknown key textkey: did you mean 'text_key'?"),
    ("corpora/text.yaml", "corpus.jsonl", "nope.jsonl", "data/nope.jsonl does not exist. Edit `files:`"),
]  # fmt: skip


@pytest.mark.usefixtures("inputs")
def test_a_mistake_in_a_finished_project_is_told(project: Path, snakemake: Snakemake) -> None:
    """Snakemake alone would say that nothing is to be done: the outputs exist, and it cannot tell what they are of."""
    assert snakemake("-c", "2").returncode == 0
    for number, (file, right, wrong, told) in enumerate(MISTAKES):
        path = project / "config" / file
        text = path.read_text()
        assert right in text
        path.write_text(text.replace(right, wrong))
        done = snakemake("-n", *([] if number % 2 else ["export_llama2_7b"]))
        assert done.returncode == 1 and told in done.stdout, done.stdout
        path.write_text(text)
    assert "Nothing to be done" in snakemake("-n").stdout
