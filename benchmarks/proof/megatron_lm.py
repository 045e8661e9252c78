"""Runs NVIDIA Megatron-LM's own converters on tiny checkpoints, on the CPU, and lists the digests of what they wrote.

Repository: github.com/NVIDIA/Megatron-LM, commit 368f5611a4 (2024-09-25, core 0.9). tools/checkpoint/convert.py with
the loader llama_mistral and the savers megatron ("legacy") and mcore, on Llamas and on two Mistrals; and, with the
rank files of one mcore case, megatron.training.checkpointing.save_checkpoint in its default format, torch_dist, in
one and in four gloo processes.

A Python of its own, in which the project's llmpipe is not installed:

    pip install torch==2.4.1 transformers==4.46.3 "setuptools<80" "numpy<2"
    pip install einops psutil safetensors pydantic six accelerate
    pip install --no-deps transformer-engine==1.11.0
    python benchmarks/proof/megatron_lm.py REPOSITORY WORK docs/proof/megatron_lm.json

What is stubbed, and nothing else:

- transformer_engine_torch, Transformer Engine's compiled part: an empty module (its Python layers, which name the
  parameters, are the true ones), and the CUDA libraries that it loads are not looked for
- torch.cuda.get_rng_state, current_device, synchronize, Stream, is_available, get_device_properties: there is no GPU
- fused_weight_gradient_mlp_cuda, a part of apex: an empty module
- flash_attn, whose version Transformer Engine asks for: empty modules
- mcore "local" only: apex's norms know no RMSNorm, so torch's stands in (the names are the layer specification's)
- megatron.legacy.fused_kernels.load: it would ask nvcc for its version

The legacy saver pads the embedding but not the head (saver_megatron.py:352), so its copy fails for any
vocabulary that needs padding. It is given checkpoints whose embedding and head are padded already. The loader writes
seq_length = 4096 (loader_llama_mistral.py:301) and refuses fewer positions: max_position_embeddings is 8192 here.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from megatron_lm_stubs import stub
from safetensors.torch import load_file, save_file

COMMIT = "368f5611a4"
# saver, implementation, shape, dtype, tp, pp
CASES = [
    ("mcore", "transformer_engine", "gqa_8_2", "float32", 2, 2),
    ("mcore", "transformer_engine", "gqa_6_3", "bfloat16", 1, 4),
    ("mcore", "transformer_engine", "gqa_12_4", "float16", 4, 1),
    ("mcore", "local", "mha_4", "float32", 1, 1),
    ("megatron", "local", "gqa_8_2", "float32", 2, 2),
    ("megatron", "local", "gqa_6_3", "bfloat16", 1, 4),
    ("megatron", "local", "gqa_12_4", "float16", 4, 1),
]
# The same weights as Mistrals, with what config.json says then: v0.1 has a window, which the loader does not read.
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
MISTRALS = [
    (("mcore", "transformer_engine", "gqa_8_2", "bfloat16", 2, 2), MISTRAL | {"sliding_window": 48}),
    (("megatron", "local", "gqa_6_3", "float32", 1, 2), MISTRAL | {"sliding_window": None}),
]
RESHARDED = [("mcore", "mcore", 0, 1, 4), ("megatron", "megatron", 4, 1, 1)]  # loader, saver, case, tp, pp
ARGS = (
    "num_layers", "hidden_size", "num_attention_heads", "group_query_attention", "num_query_groups", "kv_channels",
    "ffn_hidden_size", "padded_vocab_size", "vocab_size", "make_vocab_size_divisible_by", "max_position_embeddings",
    "seq_length", "norm_epsilon", "normalization", "apply_layernorm_1p", "position_embedding_type", "rotary_base",
    "rotary_percent", "rotary_interleaved", "use_rope_scaling", "rotary_seq_len_interpolation_factor", "swiglu",
    "add_bias_linear", "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "params_dtype", "bf16", "fp16", "transformer_impl", "use_legacy_models", "tokenizer_type", "iteration",
    "ckpt_format",
)  # fmt: skip


def tokenizer(directory: Path, vocab: int) -> None:
    """A tokenizer of so many words: the converters ask for their number."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)


def source(directory: Path, shape: str, dtype: torch.dtype, padded: int | None, said: dict[str, Any]) -> None:
    """The tiny checkpoint, its vocabulary padded with copies of the last row if so asked; `said`: by config.json."""
    vocab = tiny.SHAPES[shape][-1]
    tiny.write(shape, directory, dtype, **{"max_position_embeddings": 8192, "vocab_size": padded or vocab} | said)
    tokenizer(directory, vocab)
    if padded is None:
        return
    tensors = load_file(directory / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = tensors[name]
        tensors[name] = torch.cat([rows, rows[-1:].expand(padded - len(rows), -1)])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def convert(options: argparse.Namespace) -> None:
    """One run of tools/checkpoint/convert.py, in this process and the one that it forks."""
    stub(options.repository)
    sys.argv = ["convert.py", *options.rest]
    runpy.run_path(str(options.repository / "tools" / "checkpoint" / "convert.py"), run_name="__main__")


def save_torch_dist(options: argparse.Namespace) -> None:
    """One process of Megatron's own save_checkpoint in torch_dist, with the weights and args of a rank file."""
    stub(options.repository)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    loaded, saved = (Path(name) for name in options.rest)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    from megatron.core import mpu
    from megatron.training.checkpointing import save_checkpoint  # type: ignore[import-not-found]
    from megatron.training.global_vars import set_global_variables  # type: ignore[import-not-found]

    mpu.initialize_model_parallel(*((2, 2) if world == 4 else (1, 1)))
    names = [f"mp_rank_{mpu.get_tensor_model_parallel_rank():02d}"]
    names += [f"{mpu.get_pipeline_model_parallel_rank():03d}"] * (world > 1)
    state = torch.load(loaded / "iter_0000001" / "_".join(names) / "model_optim_rng.pt", weights_only=False)
    args = state["args"]
    args.rank, args.world_size, args.save = rank, world, str(saved)
    args.ckpt_format, args.use_dist_ckpt, args.no_save_rng = "torch_dist", True, False
    set_global_variables(args, build_tokenizer=False)
    from pretrain_gpt import model_provider  # type: ignore[import-not-found]

    first, last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()
    model = model_provider(first, last).to(args.params_dtype)
    model.load_state_dict(state["model"])
    save_checkpoint(1, [model], None, None, 0)


def run(options: argparse.Namespace, mode: str, rest: list[object], environment: dict[str, str] | None = None) -> Any:
    """This file again in a process of its own."""
    command = [sys.executable, __file__, str(options.repository), str(options.work), mode, *map(str, rest)]
    log = (options.work / "log").open("a")
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} | (environment or {})
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested tables by their dotted names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, value in tree.items() for k, v in leaves(value, f"{prefix}.{name}".strip(".")).items()}


def listed(tensor: torch.Tensor) -> dict[str, object]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "sha256": tiny.digest(tensor)}


def described(root: Path, names: tuple[str, ...] = ARGS) -> dict[str, object]:
    """The tensors of every rank file, what else is in them, and the args that say what the model is."""
    files, others, state = {}, set(), {}
    for path in sorted(root.glob("iter_*/mp_rank_*/*.pt")):
        state = torch.load(path, weights_only=False)
        found = leaves(state["model"])
        files[str(path.relative_to(root))] = {k: listed(v) for k, v in found.items() if isinstance(v, torch.Tensor)}
        others |= {f"{k.split('.')[-1]}: {type(v).__name__}" for k, v in found.items() if type(v) is not torch.Tensor}
    assert files, f"{root}: nothing was written"
    args = {name: getattr(state["args"], name, "absent") for name in names}
    top = {k: type(v).__name__ if k in ("args", "model") else v for k, v in state.items()}
    tracker = (root / "latest_checkpointed_iteration.txt").read_text()
    return {
        "latest_checkpointed_iteration": tracker,
        "top": top,
        "args": {k: v if type(v) in (int, float, bool, str, type(None)) else str(v) for k, v in args.items()},
        "not_tensors": sorted(others),
        "files": files,
    }


def described_dist(root: Path) -> dict[str, object]:
    """The tensors of a torch_dist checkpoint as torch's own reader gives them, and its files."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    folder = root / "iter_0000001"
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    sizes = {k: v for k, v in metadata.items() if hasattr(v, "size")}
    state = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in sizes.items()}
    load(state, storage_reader=FileSystemReader(folder))
    common = torch.load(folder / "common.pt", weights_only=False)
    return {
        "latest_checkpointed_iteration": (root / "latest_checkpointed_iteration.txt").read_text(),
        "metadata.json": json.loads((folder / "metadata.json").read_text()),
        "common.pt": {k: type(v).__name__ for k, v in common.items()},
        "names": sorted(path.name for path in folder.iterdir()),
        "not_tensors": sorted(set(metadata) - set(sizes)),
        "pieces": {k: [[*c.offsets, *c.sizes] for c in v.chunks] for k, v in sizes.items()},
        "tensors": {k: listed(v) for k, v in state.items()},
    }


def text(value: Any, depth: int = 0) -> str:
    """JSON with a line for each tensor."""
    if isinstance(value, dict | list) and len(json.dumps(value)) > 200:
        inner = [text(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]
        inner = (
            [f"{json.dumps(k)}: {v}" for k, v in zip(value, inner, strict=True)] if isinstance(value, dict) else inner
        )
        start, stop = "{}" if isinstance(value, dict) else "[]"
        indent = "\n" + " " * (depth + 1)
        return start + indent + f",{indent}".join(inner) + indent[:-1] + stop
    return json.dumps(value)


def converted(
    options: argparse.Namespace, case: tuple[Any, ...], said: dict[str, Any] | None = None
) -> tuple[Path, dict[str, object]]:
    """One case: HF to rank files; `said`: by config.json, of a Mistral."""
    saver, impl, shape, dtype, tp, pp = case
    size = "mistral-7B" if said else "llama2-7B"
    name = f"{size}-{saver}-{impl}-{shape}-tp{tp}-pp{pp}"
    step = 128 * tp
    padded = -(-tiny.SHAPES[shape][-1] // step) * step if saver == "megatron" else None
    hf, out = options.work / f"hf-{name}", options.work / name
    source(hf, shape, getattr(torch, dtype), padded, said or {})
    half = {"bfloat16": ["--bf16"], "float16": ["--fp16"]}.get(dtype, [])
    rest = ["--model-type", "GPT", "--loader", "llama_mistral", "--saver", saver, "--load-dir", hf, "--save-dir", out]
    rest += ["--model-size", size, "--checkpoint-type", "hf", "--tokenizer-model", hf, *half]
    rest += [
        "--target-tensor-parallel-size",
        tp,
        "--target-pipeline-parallel-size",
        pp,
        "--saver-transformer-impl",
        impl,
    ]
    assert out.exists() or run(options, "convert", rest).wait() == 0, name
    head = {"direction": "hf to megatron", "saver": saver, "transformer_impl": impl, "shape": shape, "dtype": dtype}
    head |= {"tp": tp, "pp": pp, "padded_source": padded is not None}
    head |= {"model_size": size, "config.json": said} if said else {}
    return out, head | described(out, (*ARGS, "window_size") if said else ARGS)


def main(options: argparse.Namespace) -> None:
    """All cases, one after the other."""
    sys.path.insert(0, str(options.repository))  # the files name its classes, which need no Transformer Engine
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    made = [converted(options, case) for case in CASES]
    cases = [case for _, case in made]
    for loader, saver, number, tp, pp in RESHARDED:
        out = options.work / f"resharded-{loader}-{saver}"
        rest = ["--model-type", "GPT", "--loader", loader, "--saver", saver, "--load-dir", made[number][0]]
        rest += ["--save-dir", out, "--target-tensor-parallel-size", tp, "--target-pipeline-parallel-size", pp]
        rest += ["--true-vocab-size", tiny.SHAPES[cases[number]["shape"]][-1]]
        assert out.exists() or run(options, "convert", rest).wait() == 0, out.name
        head = {
            "direction": f"{loader} to {saver}",
            "from": number,
            "shape": cases[number]["shape"],
            "tp": tp,
            "pp": pp,
        }
        cases.append(head | described(out))
    for world, number in ((1, 3), (4, 0)):
        out = options.work / f"torch_dist-{world}"
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "WORLD_SIZE": str(world)}
        if not out.exists():
            rest = [made[number][0], out]
            ranks = [run(options, "torch_dist", rest, where | {"RANK": str(rank)}) for rank in range(world)]
            assert not any(rank.wait() for rank in ranks), out.name
        head = {"direction": "save_checkpoint, torch_dist", "from": number, "shape": cases[number]["shape"]}
        cases.append(head | {"world": world} | described_dist(out))
    cases += [converted(options, case, said)[1] for case, said in MISTRALS]
    versions = {"torch": torch.__version__}
    report = {"system": "Megatron-LM", "commit": COMMIT, "versions": versions, "cases": cases}
    options.rest[0].write_text(text(report) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("mode")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if given.mode in ("convert", "torch_dist"):
        {"convert": convert, "torch_dist": save_torch_dist}[given.mode](given)
    else:
        given.rest = [Path(given.mode)]
        main(given)
