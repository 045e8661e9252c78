"""Run the converters of MinfanZhao/Megatron-LM_ (branch llama-sft) on tiny checkpoints, and record what they write.

    git clone -b llama-sft https://github.com/MinfanZhao/Megatron-LM_ && git -C Megatron-LM_ checkout 619b0a0
    pip install torch "transformers==4.40.2" accelerate einops six
    python benchmarks/proof/megatron_llama_mfz.py Megatron-LM_ --output docs/proof/megatron_llama_mfz.json

The four steps, in the original's order: Hugging Face → Meta's .pth (convert_llama_pth_from_hf), .pth → Megatron
(checkpoint_convert_from_llama_pth), Megatron → .pth (checkpoint_convert_to_llama_pth), .pth → Hugging Face
(convert_llama_pth_to_hf). They know four sizes, by tables in their modules: our tiny shape takes the place of one
name in those tables (7B: one shard; 13B: two; 30B: four). Of convert_llama_pth_from_hf, whose body is no function,
`save_shards` is called with the globals that the body sets; the body itself loads in float16, whatever the source.
The last step computes the ffn size from `dim` alone; that function is told the tiny shape's.
TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD stands for the torch of 2023, whose load took any pickle. Of the ways back, the
record lists only the tensors that differ from what went in. Its model is run, too: see megatron_llama_forward.py.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import record
import torch
from megatron_llama_forward import run as run_model
from megatron_llama_forward import stub
from tiny import SHAPES, config, state_dict

NUM_SHARDS = {"7B": 1, "13B": 2, "30B": 4}
# shape, dtype, the size it stands for, tp, pp, make_vocab_size_divisible_by
CASES = [
    ("mha_4", "float32", "7B", 1, 1, 128),
    ("mha_4", "float16", "13B", 2, 2, 1),
    ("mha_4", "float32", "30B", 4, 1, 16),
    ("mha_6", "float16", "13B", 3, 2, 8),
    ("mha_6", "float32", "7B", 2, 4, 1),
]


def tools(checkout: Path) -> dict[str, ModuleType]:
    """The four modules, by what they do."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    sys.path.insert(0, str(checkout / "tools/llama"))
    names = {
        "hf_to_pth": "convert_llama_pth_from_hf",
        "pth_to_megatron": "checkpoint_convert_from_llama_pth",
        "megatron_to_pth": "checkpoint_convert_to_llama_pth",
        "pth_to_hf": "convert_llama_pth_to_hf",
    }
    return {name: importlib.import_module(module) for name, module in names.items()}


def shrink(module: ModuleType, shape: str, size: str) -> None:
    """Let a name of the original's tables mean a tiny shape."""
    num_layers, hidden, num_heads, _, _, ffn, _ = SHAPES[shape]
    tables = {"NUM_LAYERS": num_layers, "N_HEADS": num_heads, "DIM": hidden, "INTERMEDIATE_SIZE_MAP": ffn}
    for table, value in tables.items():
        getattr(module, table, {})[size] = value


def hf_to_pth(module: ModuleType, shape: str, dtype: str, size: str, output: Path) -> None:
    num_layers, hidden, num_heads, *_ = SHAPES[shape]
    module.params = {**module.params_of_models["7B"], "dim": hidden, "n_heads": num_heads, "n_layers": num_layers}
    module.n_heads, module.dim, module.output_dir = num_heads, hidden, str(output)
    module.save_shards(model_sd=state_dict(shape, getattr(torch, dtype)), num_shards=NUM_SHARDS[size])


def pth_to_hf(module: ModuleType, shape: str, pth: Path, output: Path, size: str) -> dict[str, object]:
    """The last step: its ffn size follows from `dim` alone, so a tiny shape's has to be put in."""
    params = pth / size / "params.json"
    params.write_text(json.dumps({"dim": SHAPES[shape][1], "n_heads": SHAPES[shape][2], "n_layers": SHAPES[shape][0]}
                                 | {"norm_eps": config(shape)["rms_norm_eps"]}))  # fmt: skip
    module.compute_intermediate_size = lambda n: SHAPES[shape][5]
    module.write_model(str(output), str(pth / size), size, fp32=True)
    from safetensors.torch import load_file

    return {"model.safetensors": record.tensors(load_file(output / "model.safetensors"))}


def case(
    modules: dict[str, ModuleType], work: Path, row: tuple[str, str, str, int, int, int]
) -> list[dict[str, object]]:
    shape, dtype, size, tp, pp, divisor = row
    for module in modules.values():
        shrink(module, shape, size)
    told = {"shape": shape, "dtype": dtype, "pth_shards": NUM_SHARDS[size], "tp": tp, "pp": pp}
    told["make_vocab_size_divisible_by"] = divisor
    pth, megatron, again = work / "pth" / size, work / "megatron", work / "again"
    hf_to_pth(modules["hf_to_pth"], shape, dtype, size, pth)
    modules["pth_to_megatron"].convert_model(str(megatron), str(pth), size, tp, pp, divisor)
    modules["megatron_to_pth"].convert_model(str(again), str(megatron), size, tp, pp)
    params = json.loads((pth / "params.json").read_text())
    tracker = (megatron / "latest_checkpointed_iteration.txt").read_text()
    first, last = record.directory(pth), record.directory(again / size)
    found = [
        {**told, "direction": "hf_to_pth", "params.json": params, **first},
        {**told, "direction": "pth_to_megatron", "tracker": tracker, **record.directory(megatron)},
        {**told, "direction": "megatron_to_pth", **record.differing(last["files"], first["files"])},
    ]
    if dtype == "float32":
        files = pth_to_hf(modules["pth_to_hf"], shape, again, work / "hf", size)
        written = json.loads((work / "hf/config.json").read_text())
        source = {"model.safetensors": record.tensors(state_dict(shape))}
        found.append({**told, "direction": "pth_to_hf", "config": written, **record.differing(files, source)})
    return found


def forward(modules: dict[str, ModuleType], checkout: Path, work: Path) -> dict[str, object]:
    """The logits of its model."""
    for module in modules.values():
        shrink(module, "mha_6", "7B")
    stub(work / "stubs")
    hf_to_pth(modules["hf_to_pth"], "mha_6", "float32", "7B", work / "pth")
    modules["pth_to_megatron"].convert_model(str(work / "megatron"), str(work / "pth"), "7B", 1, 1, 8)
    file = work / "megatron/release/mp_rank_00/model_optim_rng.pt"
    case = {"shape": "mha_6", "dtype": "float32", "tp": 1, "pp": 1, "make_vocab_size_divisible_by": 8}
    return case | {"direction": "forward", **run_model("mfz", checkout, work / "stubs", "mha_6", file, 136)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    modules = tools(checkout)
    cases: list[dict[str, object]] = []
    for row in CASES:
        with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
            cases += case(modules, Path(name), row)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        cases.append(forward(modules, checkout, Path(name)))
    system = "MinfanZhao/Megatron-LM_, branch llama-sft, tools/llama"
    record.write(arguments.output, {"system": system, "commit": record.commit(checkout), "cases": cases})


if __name__ == "__main__":
    main()
