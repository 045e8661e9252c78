"""Commands inside sentences: llmpipe's and Snakemake's have the options that they name, make's are planned by make.

A word in capitals stands for what the reader puts there, and one word alone is the name of a program.
"""

import re
import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path

import click
import pytest
from commands import REPOSITORY, blocks, inline, succeeded
from test_howto_claims import FROM, failures, options

from llmpipe.cli import COMMANDS, group

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
TARGET = re.compile(r"(convert|verify|finetune|evaluate|export|report)_([a-z]\w*)")
SHOWN = {" ".join(line.split()) for page in PAGES for block in blocks(page) for line in block.text.splitlines()}
"""Lines of the blocks, which other tests run."""
ELSEWHERE = {
    "export PATH=$PWD/.venv/bin:$PATH": "every block is run with this PATH: commands.environment",
    "mlflow server": "the name of what tests/track starts",
    "touch RUN/stop": "a training is stopped so in tests/train",
    "touch results/runs/one_gpu/stop": "the same, of the run of that page",
    "touch results/runs/RUN/stop": "the same, of any run",
    "git lfs pull": "takes a clone of a hub's repository",
    "srun --gpus=1 llmpipe doctor": "tests/cluster/test_slurm_gpus.py",
    "srun llmpipe doctor": "the same",
    "squeue -u $USER -o '%i %k %T %Z'": "tests/cluster/test_slurm_gpus.py",
}
"""Where another test runs it, or why none does."""
NOT_OURS = {
    "--apply-layernorm-1p": "Megatron's",
    "--rope-style": "llama.cpp's and Megatron's",
    "--exclude": "sbatch's",
    "--turn": "of the benchmark that the page is about",
    "--bind": "Apptainer's",
    "--containall": "Apptainer's",
    "--cleanenv": "Apptainer's",
    "--pid": "Apptainer's",
}
"""Options of other programs."""
OF_OTHERS = [*FROM, REPOSITORY / "docs/recipes.md"]
"""Pages with tables of Megatron's and EasyLM's options beside ours."""


def full(page: Path) -> list[str]:
    """A page's commands of more than one word; what a table quotes as a message is none."""
    quoted = failures() if page.stem == "when-something-fails" else {}
    return [text for text in inline(page) if text not in quoted]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_command_in_a_sentence_is_one_that_works(page: Path) -> None:
    for text in full(page):
        program = text.split()[0]
        if text in SHOWN | ELSEWHERE.keys():
            continue
        assert program in CHECKS, f"{page.name}: {text}: run it in a test, and say in ELSEWHERE in which"
        CHECKS[program](text)


def check_llmpipe(text: str) -> None:
    """The command is there, and takes these options, with these values where it has a list of them."""
    _, name, *words = shlex.split(text)
    if name in ("COMMAND", "…", "--help"):
        return
    assert name in COMMANDS, text
    parameters = {option: each for each in group.get_command(click.Context(group), name).params for option in each.opts}
    for option, value in pairwise([*words, ""]):
        if option.startswith("-"):
            assert option in {*options(name), "--help"}, text
            kind = parameters[option].type if option in parameters else None
            if isinstance(kind, click.Choice) and re.fullmatch("[a-z0-9]+", value):
                assert value in kind.choices, text


@cache
def snakemake_options() -> set[str]:
    from snakemake.cli import get_argument_parser

    return {*get_argument_parser()._option_string_actions}


def check_snakemake(text: str) -> None:
    """The options are Snakemake's, and a target that is named in full is one of the project's or the demo's."""
    for word in shlex.split(text)[1:]:
        assert not word.startswith("-") or word in snakemake_options(), text
        if target := TARGET.fullmatch(word):
            kind = "models" if target[1] in ("convert", "verify") else "runs"
            files = [root / f"config/{kind}/{target[2]}.yaml" for root in (REPOSITORY, REPOSITORY / "demo")]
            assert any(file.exists() for file in files), text


def check_make(text: str) -> None:
    succeeded(text.replace("make", "make -n", 1), REPOSITORY)


def check_python(text: str) -> None:
    succeeded(text, REPOSITORY)


CHECKS = {"llmpipe": check_llmpipe, "snakemake": check_snakemake, "make": check_make, "python": check_python}


def test_nothing_is_excused_that_is_not_there() -> None:
    assert ELSEWHERE.keys() <= {text for page in PAGES for text in full(page)}


def test_an_option_by_itself_is_one_of_ours() -> None:
    known = {option for name in COMMANDS for option in options(name)} | snakemake_options() | NOT_OURS.keys()
    for page in (page for page in PAGES if page not in OF_OTHERS):
        for text in inline(page, program=r"--\w"):
            assert re.split("[ =]", text)[0] in known, f"{page.name}: {text}"
