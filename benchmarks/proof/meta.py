"""Run Meta's own converter, and transformers' for the way back, on tiny checkpoints, and record what they write.

    git clone https://github.com/meta-llama/llama-cookbook && git -C llama-cookbook checkout 0e00335
    pip install torch "transformers==4.46.3" accelerate fire tiktoken   # its way back was removed in transformers 5
    python benchmarks/proof/meta.py llama-cookbook --output docs/proof/meta.json

Meta's tool (src/llama_cookbook/tools/convert_hf_weights_to_llama.py) writes bfloat16 alone, in as many files as its
table says for a size's name: the name 7B is given the number that is wanted. It reads params.json, which is ours to
make, from the output directory, and splits the embedding by rows where vocab_size is 128256: the tiny model's is told
so for that case. The way back is transformers.models.llama.convert_llama_weights_to_hf; of it the record lists only
what differs from the source. TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD stands for the torch of its time.
"""

import argparse
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from types import ModuleType

import record
import torch
from safetensors.torch import load_file
from tiny import SHAPES, config, state_dict, write

TOOL = "src/llama_cookbook/tools/convert_hf_weights_to_llama.py"
LLAMA3_VOCAB = 128256
# shape, files, whether the embedding is split by rows
CASES = [("mha_4", 4, False), ("gqa_8_2", 1, False), ("gqa_8_2", 2, True), ("gqa_6_3", 3, False), ("gqa_12_4", 4, True)]


def tool(checkout: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_hf_weights_to_llama", checkout / TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def params(shape: str, vocab: int) -> dict[str, object]:
    """params.json with the ffn size by Meta's formula: multiple_of 1 and a multiplier that hits it."""
    num_layers, hidden, num_heads, num_kv_heads, _, ffn, _ = SHAPES[shape]
    return {
        "dim": hidden,
        "n_layers": num_layers,
        "n_heads": num_heads,
        "n_kv_heads": num_kv_heads,
        "vocab_size": vocab,
        "multiple_of": 1,
        "ffn_dim_multiplier": (ffn + 0.5) / int(8 * hidden / 3),
        "norm_eps": config(shape)["rms_norm_eps"],
        "rope_theta": config(shape)["rope_theta"],
    }


def case(module: ModuleType, work: Path, shape: str, shards: int, rows: bool) -> list[dict[str, object]]:
    from transformers.models.llama.convert_llama_weights_to_hf import write_model

    hf, meta, again = work / "hf", work / "meta", work / "again"
    write(shape, hf, torch.bfloat16)
    meta.mkdir()
    (meta / "params.json").write_text(json.dumps(params(shape, LLAMA3_VOCAB if rows else -1)))
    module.NUM_SHARDS["7B"] = shards
    module.write_model(str(hf), "7B", str(meta))
    version = "3" if rows else "2"
    write_model(str(again), str(meta), llama_version=version, vocab_size=SHAPES[shape][-1], num_shards=shards)
    told = {"shape": shape, "dtype": "bfloat16", "shards": shards, "embedding": "rows" if rows else "columns"}
    source = {"model.safetensors": record.tensors(state_dict(shape, torch.bfloat16))}
    back = {"model.safetensors": record.tensors(load_file(again / "model.safetensors"))}
    written = json.loads((again / "config.json").read_text())
    return [
        {**told, "direction": "hf_to_meta", **record.directory(meta)},
        {**told, "direction": "meta_to_hf", "config": written, **record.differing(back, source)},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    module = tool(arguments.checkout)
    cases: list[dict[str, object]] = []
    for row in CASES:
        with tempfile.TemporaryDirectory() as name:
            cases += case(module, Path(name), *row)
    system = "meta-llama/llama-cookbook, convert_hf_weights_to_llama; back: transformers 4.46.3"
    record.write(arguments.output, {"system": system, "commit": record.commit(arguments.checkout), "cases": cases})


if __name__ == "__main__":
    main()
