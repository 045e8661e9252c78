"""Run the converter of alibaba/Megatron-LLaMA, both directions, on tiny checkpoints, and record what it writes.

    git clone https://github.com/alibaba/Megatron-LLaMA && git -C Megatron-LLaMA checkout 25306de
    pip install torch "transformers==4.40.2" einops six    # shard_checkpoint, which it imports, was removed later
    python benchmarks/proof/megatron_llama_ali.py Megatron-LLaMA --output docs/proof/megatron_llama_ali.json

The original is run as a user runs it, as a process of its own. Stubbed: `apex` and `amp_C`, which `import megatron`
asks for and conversion never calls. TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD stands for the torch of 2023, whose load took
any pickle. The way back needs two fields of `args` that the way there does not write and a training run does
(`layernorm_epsilon`, `seq_length`): they are added to the files between the two. Its model is run, too: see
megatron_llama_forward.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import record
import torch
from megatron_llama_forward import run as run_model
from megatron_llama_forward import stub
from tiny import config, state_dict, write

SCRIPT = "tools/checkpoint_conversion/llama_checkpoint_conversion.py"
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# shape, dtype, tp, pp, make_vocab_size_divisible_by, and whether the way back works in the original
CASES = [
    ("mha_4", "float32", 1, 1, 128, True),
    ("mha_4", "float16", 2, 2, 1, False),
    ("mha_4", "bfloat16", 4, 1, 16, True),
    ("mha_6", "float32", 2, 1, 1, True),
    ("mha_6", "bfloat16", 2, 2, 8, False),
    ("mha_6", "float32", 1, 4, 1, False),
]
# shape, tp, pp: the first is refused though it could be done; the second drops a layer without a word
REFUSED = [("mha_6", 3, 1), ("mha_6", 1, 3)]


def source(shape: str, directory: Path) -> None:
    """A Hugging Face directory as the original can read it: one pytorch_model.bin, float32."""
    write(shape, directory)
    (directory / "model.safetensors").unlink()
    torch.save(state_dict(shape), directory / "pytorch_model.bin")


def run(checkout: Path, stubs: Path, load: Path, save: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(stubs), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    paths = ["--load_path", load, "--save_path", save, "--megatron-path", checkout]
    return subprocess.run(
        [sys.executable, "-W", "ignore", checkout / SCRIPT, *paths, *options],
        env=environment,
        capture_output=True,
        text=True,
    )


def forth(checkout: Path, stubs: Path, hf: Path, save: Path, dtype: str, tp: int, pp: int, divisor: int) -> str:
    """Hugging Face → Megatron; the last line of its errors, empty where all is well."""
    done = run(
        checkout,
        stubs,
        hf,
        save,
        *("--target_tensor_model_parallel_size", str(tp)),
        *("--target_pipeline_model_parallel_size", str(pp)),
        *("--target_params_dtype", DTYPES[dtype]),
        *("--make_vocab_size_divisible_by", str(divisor)),
    )
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def train(directory: Path, shape: str) -> None:
    """Add to every file the two fields of `args` that a training run's files have."""
    for path in directory.rglob("model_optim_rng.pt"):
        tree = torch.load(path, weights_only=False)
        tree["args"].layernorm_epsilon = config(shape)["rms_norm_eps"]
        tree["args"].seq_length = 256
        torch.save(tree, path)


def back(checkout: Path, stubs: Path, megatron: Path, save: Path, dtype: str) -> str:
    options = ("--convert_checkpoint_from_megatron_to_transformers", "--target_params_dtype", DTYPES[dtype])
    done = run(checkout, stubs, megatron, save, *options)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def returned(directory: Path, shape: str, dtype: str) -> dict[str, object]:
    """What differs, after the way there and back, from the source."""
    source = {"pytorch_model.bin": record.tensors(state_dict(shape, getattr(torch, dtype)))}
    written = json.loads((directory / "config.json").read_text())
    return {"config": written, **record.differing(record.directory(directory)["files"], source)}


def cases(checkout: Path, stubs: Path, work: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for shape, dtype, tp, pp, divisor, returns in CASES:
        name = f"{shape}-{dtype}-{tp}-{pp}"
        hf, megatron, again = work / shape, work / name, work / f"{name}-hf"
        source(shape, hf)
        case = {"shape": shape, "dtype": dtype, "tp": tp, "pp": pp, "make_vocab_size_divisible_by": divisor}
        failed = forth(checkout, stubs, hf, megatron, dtype, tp, pp, divisor)
        assert not failed, failed
        tracker = (megatron / "latest_checkpointed_iteration.txt").read_text()
        found.append({**case, "direction": "hf_to_megatron", "tracker": tracker, **record.directory(megatron)})
        bare = back(checkout, stubs, megatron, again, dtype)
        train(megatron, shape)
        failed = back(checkout, stubs, megatron, again, dtype)
        assert bool(failed) != returns, (name, failed)
        result = {"error": failed} if failed else returned(again, shape, dtype)
        found.append({**case, "direction": "megatron_to_hf", "error_on_its_own_output": bare, **result})
    return found


def refused(checkout: Path, stubs: Path, work: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for shape, tp, pp in REFUSED:
        save = work / f"{shape}-refused-{tp}-{pp}"
        source(shape, work / shape)
        failed = forth(checkout, stubs, work / shape, save, "float32", tp, pp, 1)
        layers = {
            key.split("encoder.")[1].split(".")[1] + " of " + name
            for name, tensors in record.directory(save)["files"].items()
            for key in tensors
            if ".layers." in key
        }
        found.append({"shape": shape, "tp": tp, "pp": pp, "error": failed, "layers_written": len(layers)})
    return found


def forward(checkout: Path, stubs: Path, work: Path) -> list[dict[str, object]]:
    """The logits of its model; where the vocabulary is padded it refuses the file of its own converter."""
    found: list[dict[str, object]] = []
    source("mha_6", work / "mha_6")
    for divisor, padded in ((1, 131), (8, 136)):
        save = work / f"forward-{divisor}"
        assert not forth(checkout, stubs, work / "mha_6", save, "float32", 1, 1, divisor)
        file = save / "release/mp_rank_00/model_optim_rng.pt"
        case = {"shape": "mha_6", "dtype": "float32", "tp": 1, "pp": 1, "make_vocab_size_divisible_by": divisor}
        case |= {"direction": "forward", **run_model("ali", checkout, stubs, "mha_6", file, padded)}
        found.append(case)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        stub(work / "stubs")
        proof = {
            "system": "alibaba/Megatron-LLaMA, tools/checkpoint_conversion/llama_checkpoint_conversion.py",
            "commit": record.commit(checkout),
            "cases": cases(checkout, work / "stubs", work) + forward(checkout, work / "stubs", work),
            "refused": refused(checkout, work / "stubs", work),
        }
    record.write(arguments.output, proof)


if __name__ == "__main__":
    main()
