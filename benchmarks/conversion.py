"""Converting and sharding beside `cp` of the same bytes, in one run: seconds, ratio, anonymous memory.

A Llama-2-7B-shaped checkpoint of random bf16 bits is made in WORK (13.5 GB with 32 layers; --layers makes it smaller).
Each command runs between two copies by `cp -r`; a command's ratio is the mean of these two divided by its own time, and
the medians over --rounds are printed as a table for docs/numbers/conversion.md. A new directory is written each time;
all of it is dropped from the disk before the next command, and `sync` waits for the disk.

    python benchmarks/conversion.py WORK [--layers 32] [--rounds 3] [--peers]

--peers adds what users do today, in one process each: safetensors load + save, transformers from_pretrained +
save_pretrained, rank files from mapped slices, torch.save of the rank files' bytes. --peer NAME COMMAND adds any other,
as Megatron's own converters run by benchmarks/proof.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HIDDEN, FFN, VOCAB = 4096, 11008, 32000
LLMPIPE = [sys.executable, "-m", "llmpipe"]
PEERS = {
    "safetensors load + save": """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
Path(sys.argv[2]).mkdir()
for file in Path(sys.argv[1]).glob("*.safetensors"):
    save_file(load_file(file), Path(sys.argv[2]) / file.name)
""",
    "transformers from_pretrained + save_pretrained": """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
""",
    "Python: mapped slices + save_file, HF → TP2 x PP2": """
import json, sys
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file
source, target = Path(sys.argv[1]), Path(sys.argv[2])
target.mkdir()
half = json.loads((source / "config.json").read_text())["num_hidden_layers"] // 2
opened = [safe_open(file, "pt") for file in source.glob("*.safetensors")]
for tp in range(2):
    for pp in range(2):
        held = {}
        for file in opened:
            for name in file.keys():
                layer = int(name.split(".")[2]) if ".layers." in name else 0 if "embed" in name else 2 * half - 1
                if layer // half != pp:
                    continue
                rows = file.get_slice(name)
                dim = 1 if "o_proj" in name or "down_proj" in name else 0
                size = rows.get_shape()[dim] // 2
                part = slice(tp * size, (tp + 1) * size)
                shape = rows.get_shape()
                held[name] = rows[:] if len(shape) == 1 else rows[part] if dim == 0 else rows[:, part].contiguous()
        save_file(held, target / f"tp{tp}-pp{pp}.safetensors")
""",
    "torch.load + torch.save of Megatron's rank files": """
import sys, torch
from pathlib import Path
for file in Path(sys.argv[1]).rglob("*.pt"):
    target = Path(sys.argv[2]) / file.relative_to(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.load(file, weights_only=False), target)
""",
}


def make_source(path: Path, layers: int) -> None:
    """A Hugging Face directory of files up to 5 GB; one buffer of finite random bf16 bits is the source of all."""
    path.mkdir(parents=True)
    random = np.random.default_rng(0).integers(0, 1 << 16, VOCAB * HIDDEN, dtype=np.uint16) & 0xBFFF
    bits = torch.from_numpy(random.view(np.int16)).view(torch.bfloat16)
    layer = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN)}
    layer |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    sizes |= {f"model.layers.{i}.{name}.weight": size for i in range(layers) for name, size in layer.items()}
    sizes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    files: list[list[str]] = [[]]
    for name in sizes:
        if sum(2 * math.prod(sizes[held]) for held in files[-1]) > 4.5e9:
            files.append([])
        files[-1].append(name)
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        tensors = {name: bits[: math.prod(sizes[name])].view(sizes[name]).clone() for name in names}
        save_file(tensors, path / file, metadata={"format": "pt"})  # without it transformers 4 refuses the file
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds, and the highest anonymous resident memory of the process in bytes; `sync` before and not within."""
    subprocess.run(["sync"], check=True)
    start, highest = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        line = next((line for line in status.splitlines() if line.startswith("RssAnon")), "RssAnon 0")
        highest = max(highest, int(line.split()[1]) * 1024)
        time.sleep(0.02)
    seconds = time.monotonic() - start
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{process.stderr.read().decode() if process.stderr else ''}")
    return seconds, highest


def compare(
    name: str, source: Path, command: list[str], output: Path, rounds: int, keep: bool = False
) -> dict[str, float | str]:
    """One row of the table: the command between copies of its source."""
    copy, ratios, times, copies, memory = output.parent / "copy", [], [], [], 0
    for _ in range(rounds):
        before = timed(["cp", "-r", str(source), str(copy)])[0]
        shutil.rmtree(copy)
        shutil.rmtree(output, ignore_errors=True)
        seconds, anonymous = timed(command)
        size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        if not keep:
            shutil.rmtree(output)
        after = timed(["cp", "-r", str(source), str(copy)])[0]
        shutil.rmtree(copy)
        times.append(seconds)
        copies.append((before + after) / 2)
        ratios.append(copies[-1] / seconds)
        memory = max(memory, anonymous)
    row: dict[str, float | str] = {
        "command": name, "GB": size / 1e9, "seconds": statistics.median(times), "cp": statistics.median(copies),
        "ratio": statistics.median(ratios), "MB": memory / 1e6,
    }  # fmt: skip
    print(
        f"| {name} | {row['GB']:.1f} | {row['seconds']:.1f} | {row['cp']:.1f} | {row['ratio']:.2f}"
        f" ({min(ratios):.2f} to {max(ratios):.2f}) | {row['MB']:.0f} |",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--peer", nargs=2, action="append", default=[], metavar=("NAME", "COMMAND"),
                        help="A converter of one's own; {source} and {output} stand for directories.")  # fmt: skip
    parser.add_argument("--only", help="Rows whose name holds this.")
    arguments = parser.parse_args()
    work, rounds = arguments.work.absolute(), arguments.rounds
    hf, ranks, meta, megatron = work / "hf", work / "ranks", work / "meta", work / "megatron"
    if not hf.exists():
        make_source(hf, arguments.layers)
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        subprocess.run([*LLMPIPE, "convert", str(hf), "--output", str(checkpoint)], check=True)
        shutil.rmtree(hf)
        hf.symlink_to(checkpoint)
    split, out = ["--tp", "2", "--pp", "2"], str(work / "out")
    mcore = ["convert", str(checkpoint), "--to", "megatron", *split]
    for path, command in (
        (ranks, ["shard", str(checkpoint), *split]),
        (meta, ["convert", str(checkpoint), "--to", "meta", "--tp", "2"]),
    ):
        if not path.exists():
            subprocess.run([*LLMPIPE, *command, "--output", str(path)], check=True)
    rows = [
        ("HF → rank files TP2 x PP2, SHA-256", checkpoint, ["shard", str(checkpoint), *split]),
        ("HF → rank files TP2 x PP2, --no-hash", checkpoint, ["shard", str(checkpoint), *split, "--no-hash"]),
        ("rank files → HF, SHA-256", ranks, ["convert", str(ranks)]),
        ("rank files → HF, --no-hash", ranks, ["convert", str(ranks), "--no-hash"]),
        ("Meta → HF, SHA-256", meta, ["convert", str(meta)]),
        ("Meta → HF, --no-hash", meta, ["convert", str(meta), "--no-hash"]),
        ("HF → Megatron mcore TP2 x PP2, SHA-256", checkpoint, mcore),
        ("HF → Megatron mcore TP2 x PP2, --no-hash", checkpoint, [*mcore, "--no-hash"]),
        ("HF → EasyLM, SHA-256", checkpoint, ["convert", str(checkpoint), "--to", "easylm"]),
        ("HF → HF cast to fp16, SHA-256", checkpoint, ["convert", str(checkpoint), "--dtype", "fp16"]),
    ]
    print("| command | GB | seconds | cp, seconds | of cp's throughput | anonymous MB |\n|---|---|---|---|---|---|")
    for name, source, command in rows:
        if not arguments.only or arguments.only in name:
            kept = "mcore" in name and arguments.peers and not megatron.exists()
            compare(name, source, [*LLMPIPE, *command, "--output", out], Path(out), rounds, kept)
            if kept:
                Path(out).rename(megatron)
    for name, program in PEERS.items() if arguments.peers else ():
        source = megatron if "Megatron" in name else checkpoint
        compare(name, source, [sys.executable, "-c", program, str(source), out], Path(out), rounds)

    for name, command in arguments.peer:
        filled = command.format(source=checkpoint, output=out)
        compare(name, checkpoint, ["bash", "-c", filled], Path(out), rounds)


if __name__ == "__main__":
    main()
