"""make_task.py CORPUS OUTPUT: a multiple-choice task from the corpus's held-out end: which line follows these four?"""

import json
import random
import sys
from pathlib import Path

NUM_QUESTIONS, NUM_CONTEXT, NUM_CHOICES = 64, 4, 4
HELD_OUT = 0.025  # the test share of config/runs/tiny_llama.yaml: the last documents


def main() -> None:
    corpus, output = Path(sys.argv[1]), Path(sys.argv[2])
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    held_out = texts[-int(len(texts) * HELD_OUT) :]
    generator = random.Random(0)
    windows = [window for text in held_out for window in windows_of(text)]
    others = [window[-1] for window in windows]
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        for window in generator.sample(windows, NUM_QUESTIONS):
            *context, right = window
            wrong = generator.sample(sorted(set(others) - {right}), NUM_CHOICES - 1)
            choices = generator.sample([right, *wrong], NUM_CHOICES)
            question = {"context": "\n".join(context) + "\n", "choices": choices, "answer": choices.index(right)}
            file.write(json.dumps(question) + "\n")
    part.replace(output)


def windows_of(text: str) -> list[list[str]]:
    """Runs of consecutive lines, none of them empty."""
    lines = text.splitlines()
    runs = (lines[i : i + NUM_CONTEXT + 1] for i in range(0, len(lines) - NUM_CONTEXT, NUM_CONTEXT + 1))
    return [run for run in runs if all(line.strip() for line in run)]


main()
