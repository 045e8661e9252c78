"""Stands in for `llmpipe`: parses its command line with the real commands, and makes the files that they would make."""

import sys
from pathlib import Path

from llmpipe.cli import group


def main() -> None:
    name, *arguments = sys.argv[1:]
    command = group.get_command(None, name)
    assert command is not None, name
    given = command.make_context(name, arguments).params
    output, part = Path(given["output"]), ""
    if given.get("part"):
        part = f".part-{given['part'].replace('/', '-of-')}"
    dataset = [".bin", ".idx", ".manifest.json"]
    told = Path(given.get("inputs", [""])[0])
    if "chats" in output.name and (name == "merge" or "kind: chat" in told.read_text()):
        dataset += [".roles.bin", ".roles.idx"]
    made = {
        "download": [output / "config.json"],
        "convert": [output / "config.json"],
        "verify": [output.with_suffix(suffix) for suffix in (".json", ".md", ".html")],
        "shard": [output / "tp0-pp0.safetensors"],
        "tokenize": [Path(f"{output}{part}{suffix}") for suffix in dataset],
        "merge": [Path(f"{output}{suffix}") for suffix in dataset],
        "finetune": [output / "weights" / "x", output / "metrics.jsonl", output / "run.json"],
        "evaluate": [output / f"table{suffix}" for suffix in (".json", ".md", ".html")],
        "export": [output / "config.json"],
        "track": [output, output.with_name("loss.svg")],
        "report": [output],
    }[name]
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


main()
