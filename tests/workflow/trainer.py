"""Stands in for `llmpipe finetune`: takes its GPUs as the launcher does, works on them, and says when it had which."""

import json
import os
import sys
import time
from pathlib import Path

import click

from llmpipe.cli import group
from llmpipe.parallel import gpus

gpus.LOCKS, gpus.POLL = Path("locks"), 0.05


def main() -> None:
    command = group.get_command(click.Context(group), "finetune")
    assert command and sys.argv[1] == "finetune"
    given = command.make_context("finetune", sys.argv[2:]).params
    run = Path(given["output"])
    with gpus.taken(given["gpus_per_node"]):
        told = {"gpus": os.environ["CUDA_VISIBLE_DEVICES"].split(","), "from": time.monotonic()}
        time.sleep(3)  # on a busy machine others start seconds later
        told["to"] = time.monotonic()
    (run / "weights").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    (run / "run.json").write_text(json.dumps(told))


main()
