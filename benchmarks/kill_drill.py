"""kill -9 at random moments of every writing command; run again, the result is that of an undisturbed run.

    python benchmarks/kill_drill.py DIRECTORY [--kills 20] [--layers 100] [--seed 0] [--commands convert-cast,shard]

Makes a model in DIRECTORY. A moment is drawn from the time between a command's first file and its last, the start of
Python left out. After a kill nothing has the output's name but a whole one; after the rerun nothing else.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, HEADS, FFN, VOCAB = 256, 8, 704, 1000
ENDED = "it had ended"


def write_hf(path: Path, layers: int) -> None:
    """A Llama of random weights in bf16."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens", "lm_head"), (VOCAB, HIDDEN))
    shapes["model.norm"] = (HIDDEN,)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {prefix + "mlp.gate_proj": (FFN, HIDDEN), prefix + "mlp.up_proj": (FFN, HIDDEN)}
        shapes |= {prefix + "mlp.down_proj": (HIDDEN, FFN)}
        shapes |= {prefix + f"{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCAB,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    path.mkdir(parents=True)
    tensors = {f"{name}.weight": torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))


def commands(folder: Path) -> dict[str, list[str]]:
    """The arguments of each, without --output."""
    hf, checkpoint = str(folder / "hf"), str(folder / "checkpoint")
    return {
        "convert-cast": ["convert", hf, "--dtype", "fp32"],
        "convert-meta": ["convert", str(folder / "meta")],
        "convert-mcore": ["convert", hf, "--to", "megatron", "--tp", "2", "--pp", "2"],
        "convert-easylm": ["convert", hf, "--to", "easylm"],
        "shard": ["shard", checkpoint, "--tp", "2", "--pp", "2"],
        "merge": ["merge", str(folder / "ranks")],
    }


def llmpipe(arguments: list[str], output: Path) -> "subprocess.Popen[bytes]":
    """A process of its own; what it says is left out."""
    program = [sys.executable, "-c", "from llmpipe.cli import main; main()", *arguments, "--output", str(output)]
    return subprocess.Popen(program, stderr=subprocess.DEVNULL)


def begun(process: "subprocess.Popen[bytes]", output: Path) -> float:
    """When it made its first file, hidden beside the output."""
    while process.poll() is None and not any(output.parent.glob(f".{output.name}.*.part")):
        time.sleep(0.001)
    return time.monotonic()


def run(arguments: list[str], output: Path) -> float:
    """To its end; the seconds from its first file on."""
    process = llmpipe(arguments, output)
    start = begun(process, output)
    if code := process.wait():
        raise SystemExit(f"llmpipe {' '.join(arguments)} ended with {code}")
    return time.monotonic() - start


def files(path: Path) -> dict[str, bytes]:
    """Every file below a path but the manifest's own line of where it came from, which is the same here."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def killed_and_run_again(arguments: list[str], output: Path, after: float, whole: dict[str, bytes]) -> str:
    """Kill some seconds after the first file and run again; what was found in between. SystemExit if it is wrong."""
    process = llmpipe(arguments, output)
    begun(process, output)
    time.sleep(after)
    process.kill()
    code = process.wait()
    beside = [path for path in output.parent.iterdir() if path != output]
    if any(not path.name.startswith(f".{output.name}.") for path in beside):
        raise SystemExit(f"killed after {after:.2f} s: left behind {beside}")
    if output.exists() and files(output) != whole:
        raise SystemExit(f"killed after {after:.2f} s: {output} stands there and is not whole")
    state = f"{'a whole one' if output.exists() else 'nothing'} stood there"
    state += f" and {len(beside)} hidden folders" if beside else ""
    run(arguments, output)
    if files(output) != whole or [path.name for path in output.parent.iterdir()] != [output.name]:
        raise SystemExit(f"killed after {after:.2f} s: the rerun is not as an undisturbed one")
    return ENDED if code == 0 else state


def prepare(folder: Path, table: dict[str, list[str]]) -> None:
    """What the commands read beside Hugging Face's directory."""
    hf, sources = str(folder / "hf"), {arguments[1] for arguments in table.values()}
    if str(folder / "meta") in sources:
        run(["convert", hf, "--to", "meta", "--tp", "2"], folder / "meta")
    if sources & {str(folder / "checkpoint"), str(folder / "ranks")}:
        run(["convert", hf], folder / "checkpoint")
        run(["shard", str(folder / "checkpoint"), "--tp", "2", "--pp", "2"], folder / "ranks")


def drill(folder: Path, kills: int, layers: int, chosen: list[str], seed: int) -> Iterator[str]:
    """All of it, a line a kill; SystemExit at the first that fails."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    write_hf(folder / "hf", layers)
    table = {name: arguments for name, arguments in commands(folder).items() if not chosen or name in chosen}
    prepare(folder, table)
    undisturbed = {}
    for name, arguments in table.items():
        seconds = run(arguments, folder / name / "out")
        undisturbed[name] = (seconds, files(folder / name / "out"))
        shutil.rmtree(folder / name / "out")
    for number in range(kills):
        name = list(table)[number % len(table)]
        seconds, whole = undisturbed[name]
        found = ENDED
        while found == ENDED:  # too late: the undisturbed run was slower
            after, seconds = draw.uniform(0.0, 1.0) * seconds, seconds * 0.8
            found = killed_and_run_again(table[name], folder / name / "out", after, whole)
        yield f"{name}: killed after {after:.3f} s, {found}; run again: the same bytes"
        if number % 2:  # an older whole output stands there the next time, or it does not
            shutil.rmtree(folder / name / "out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default="", help="some of them, comma-separated; all if left out")
    given = parser.parse_args()
    chosen = given.commands.split(",") if given.commands else []
    for number, line in enumerate(drill(given.directory, given.kills, given.layers, chosen, given.seed), 1):
        print(f"{number:2} of {given.kills}  {line}", flush=True)


if __name__ == "__main__":
    main()
