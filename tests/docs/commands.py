"""The commands that the pages of docs/ show, and a shell that runs them as a user types them.

A block ```sh is run as it is. The word after sh says what a machine of tests does in its place:

gpu     Snakemake plans it (-n), and `llmpipe finetune --dry-run` looks at the CPU
serve   the server is started, has to answer, and is ended
setup   make says what it would do (-n), in the repository; pip is left out
gsm8k   a test of its own makes the data first
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
HOWTO = REPOSITORY / "docs/howto"


@dataclass(frozen=True)
class Block:
    """One ```sh block."""

    kind: str
    text: str

    @property
    def planned(self) -> str:
        """The block on a machine without a GPU."""
        planned = re.sub(r"\bsnakemake (?!-n )", "snakemake -n ", self.text)
        return planned.replace(" --dry-run", " --dry-run --device cpu")


def blocks(page: Path) -> list[Block]:
    """Those of a page, in its order."""
    return [Block(*found) for found in re.findall(r"^```sh ?(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)]


PROGRAMS = "llmpipe|snakemake|make|mlflow|python|pip|srun|sbatch|squeue|scancel|scontrol|sinfo|touch|export|git"
"""What commands inside sentences begin with."""


def inline(page: Path, program: str = rf"(?:{PROGRAMS}) ") -> list[str]:
    """What a page says in `...`, in its sentences and tables, that begins so: commands of more than one word."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return [span for span in spans if re.match(program, span)]


def environment(**more: str) -> dict[str, str]:
    """This one, with this Python's programs on the PATH."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | more


def run(command: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A shell command in a folder."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder, env=environment(**more), text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def succeeded(command: str, folder: Path, **more: str) -> str:
    """What a command printed; it has to end well."""
    done = run(command, folder, **more)
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def run_block(block: Block, folder: Path, **more: str) -> str:
    """What a block printed, run by its kind."""
    match block.kind:
        case "":
            return succeeded(block.text, folder, **more)
        case "gpu":
            return succeeded(block.planned, folder, **more)
        case "setup":
            made = [line for line in block.text.splitlines() if line.startswith("make ")]
            return "".join(succeeded(line.replace("make", "make -n", 1), REPOSITORY) for line in made)
        case "serve":
            return served(block.text, folder)
        case "gsm8k":
            return ""
    raise AssertionError(f"a block of the kind {block.kind}")


def write_corpus(file: Path) -> None:
    """A small text: the paragraphs of docs/, one a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pages = sorted((REPOSITORY / "docs").glob("*.md"))
    paragraphs = [text for page in pages for text in page.read_text().split("\n\n")]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))


def served(command: str, folder: Path) -> str:
    """The page that a server gives, which is started, asked and ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        ["bash", "-euc", f"{command.strip()} --port {port}"],
        cwd=folder, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(1500):
            assert server.poll() is None, f"{command}: ended with {server.returncode}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10) as answer:
                    return answer.read().decode()
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"{command}: no answer")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
