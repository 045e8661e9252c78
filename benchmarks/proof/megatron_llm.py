"""Run Megatron-LLM's own converters on tiny checkpoints and list what they write: docs/proof/megatron_llm.json.

    git clone https://github.com/epfLLM/Megatron-LLM && git -C Megatron-LLM checkout 806a83302cbf
    python -m venv env && env/bin/pip install torch numpy safetensors einops "transformers==4.46.3"
    env/bin/python benchmarks/proof/megatron_llm.py --repository Megatron-LLM --output docs/proof/megatron_llm.json

Run as they are: weights_conversion/hf_to_megatron.py, tools/checkpoint_util.py with its megatron loader and saver,
weights_conversion/megatron_to_hf.py, weights_conversion/utils/permute_qkv.py, and the models of megatron/model on the
files that the first of them made. What is put in for them, all of it:

- apex, amp_C, flash_attn, nltk, wandb, fused_layer_norm_cuda and fused_weight_gradient_mlp_cuda are empty modules: they
  are imported, and not called.
- megatron.fused_kernels.load (it compiles CUDA) does nothing; torch.cuda.get_rng_state gives the CPU's.
- The sizes that hf_to_megatron.py and megatron_to_hf.py have as tables and as constants in their functions are replaced
  by the tiny model's, in the compiled functions; so are padded_vocab_size and the other sizes in the args that
  hf_to_megatron.py writes. Their other values stay.
- Tokenizers: hf_to_megatron.py copies an empty tokenizer.model, megatron_to_hf.py writes none, and FalconTokenizer is
  a vocabulary's size.
- Of the models: LayerNorm's CUDA kernel is torch's function, flash attention (taken for Falcon 7B alone, as the other
  attention's views fail with one KV head) is torch's attention, the buffer for scores is the CPU's, and the fork of
  CUDA's random numbers does nothing. rope_theta and layernorm_epsilon are given as the arguments that a user gives.
"""

import argparse
import contextlib
import enum
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import types
from argparse import Namespace
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import tiny
import tiny_falcon
import torch

COMMIT = "806a83302cbf4f7d6e147fe34bad5885cf745709"
TOKENS = [(7 * i + 3) % 131 for i in range(24)]
POSITIONS = [*range(12), *range(200, 212)]
LISTED = (0, 11, 12, 23)
THETA, EPS = 23000.0, 3e-5  # of the tiny checkpoints
ABSENT = ("apex", "amp_C", "flash_attn", "nltk", "wandb", "fused_layer_norm_cuda",
          "fused_weight_gradient_mlp_cuda")  # fmt: skip

# name: shape, dtype, model, size, then what is made of it, each from the one before: (what, tp, pp); "on": not listed.
CASES = {
    "llama2_mha": ("mha_4", "float32", "llama2", 7, (("reshard", 2, 2), ("reshard", 4, 1), ("on", 1, 1), ("hf",))),
    "llama2_gqa": ("gqa_8_2", "float32", "llama2", 70, (("reshard", 2, 2), ("reshard", 1, 4), ("on", 1, 1), ("hf",))),
    "llama2_gqa_bf16": ("gqa_6_3", "bfloat16", "llama2", 70, (("reshard", 3, 2),)),
    "llama1": ("mha_4", "float32", "llama", 7, (("reshard", 1, 1),)),
    "llama2_meta": ("gqa_12_4", "float32", "llama2", 70, ()),
    "llama2_meta_2_shards": ("gqa_12_4", "bfloat16", "llama2", 70, ()),
    "llama2_old": ("gqa_12_4", "float32", "llama2", 70, (("on", 2, 1), ("upgrade",))),
    "mistral": ("mha_4", "float32", "mistral", 7, (("reshard", 2, 1),)),
    "falcon_7b": ("falcon_7_1", "float32", "falcon", 7, (("reshard", 1, 2), ("on", 1, 1), ("hf",))),
    "falcon_40b": ("falcon_8_2", "float32", "falcon", 40, (("reshard", 2, 2), ("on", 1, 1), ("hf",))),
}
FORWARD = ("llama2_gqa", "falcon_7b", "falcon_40b")
# What the original offers and cannot do, and what it does without a word though it cannot be right.
FAILS = {
    "codellama --size 7": ("mha_4", "codellama", 7, None),
    "permute_qkv.py of a fresh 7B": ("mha_4", "llama2", 7, "upgrade"),
    "megatron_to_hf.py --model mistral": ("mha_4", "mistral", 7, "hf"),
    "checkpoint_util.py to TP 4 of 2 KV heads": ("gqa_8_2", "llama2", 70, "reshard"),
}


def sizes_of(shape: str) -> dict[str, int]:
    """A tiny model's sizes by Megatron's names."""
    if shape in tiny.SHAPES:
        names = ("num_layers", "hidden_size", "num_attention_heads", "num_attention_heads_kv", "_", "ffn", "vocab")
        return dict(zip(names, tiny.SHAPES[shape], strict=True))
    names = ("num_layers", "hidden_size", "num_attention_heads", "num_attention_heads_kv", "_", "vocab", "_")
    return dict(zip(names, tiny_falcon.SHAPES[shape], strict=True))


# --- Stand-ins, in the process that runs a script of the original.


def stand_in(repository: Path) -> None:
    """Make the original importable on a machine without CUDA."""
    sys.path[:0] = [str(repository), str(repository / "weights_conversion"), str(repository / "tools")]
    parts = ("multi_tensor_apply", "optimizers", "bert_padding")
    for name in [*ABSENT, *(f"{name}.{part}" for name in ABSENT for part in parts)]:
        sys.modules[name] = MagicMock(__path__=[], __spec__=ModuleSpec(name, None))
    torch.cuda.get_rng_state = torch.get_rng_state


def with_constants(function: types.FunctionType, new: dict) -> types.FunctionType:
    """The same function with other constants, also in the functions inside it."""

    def replaced(code: types.CodeType) -> types.CodeType:
        constants = tuple(
            replaced(c) if isinstance(c, types.CodeType) else new.get(c, c) if type(c) is int else c
            for c in code.co_consts
        )
        return code.replace(co_consts=constants)

    function.__code__ = replaced(function.__code__)
    return function


def step_convert(repository: Path, shape: str, model: str, size: str, source: str, target: str, old: str) -> None:
    """hf_to_megatron.py; `old`: without its permute of rows, as its first versions wrote (made for permute_qkv.py)."""
    sys.path.insert(0, str(repository / "weights_conversion"))
    import hf_to_megatron as original

    sizes, size = sizes_of(shape), int(size)
    for table, name in (("layer", "num_layers"), ("heads", "num_attention_heads"), ("hidden", "hidden_size")):
        getattr(original, f"llama_s2{table}")[size] = sizes[name]
    original.llama_s2dense[size] = sizes.get("ffn")
    kv = sizes["num_attention_heads_kv"]
    with_constants(original.llama_to_megatron, {8: kv})
    with_constants(original.mistral_to_megatron, {32: sizes["num_layers"], 4096: sizes["hidden_size"], 8: kv})
    falcon = {7: (32, 4544, 71, 1), 40: (60, 8192, 128, 8)}.get(size, ())
    with_constants(original.falcon_to_megatron, dict(zip(falcon, list(sizes.values())[:4], strict=False)))
    own = {"padded_vocab_size": sizes["vocab"], "num_attention_heads_kv": kv, "ffn_hidden_size": sizes.get("ffn"),
           "num_layers": sizes["num_layers"], "hidden_size": sizes["hidden_size"],
           "num_attention_heads": sizes["num_attention_heads"]}  # fmt: skip
    original.Namespace = lambda **args: Namespace(**{k: own.get(k, v) for k, v in args.items()})
    (Path(target).parent / "tokenizer.model").touch()
    tokenizer = Namespace(vocab_file=Path(target).parent / "tokenizer.model")
    original.LlamaTokenizer = Namespace(from_pretrained=lambda *_, **__: tokenizer)
    if old == "old":
        original.permute_qkv = lambda rows, *_: rows
    meta = (Path(source) / "consolidated.00.pth").exists()
    original.main(model, size, Path(target), Path(source) if meta else None, None if meta else source)


def step_reshard(
    repository: Path, shape: str, model: str, tp: str, pp: str, source: str, target: str, dtype: str
) -> None:
    """tools/checkpoint_util.py."""
    stand_in(repository)
    import checkpoint_util
    import megatron.fused_kernels
    import megatron.global_vars
    import megatron.tokenizer.tokenizer as tokenizers

    def vocabulary(args: Namespace) -> Namespace:
        args.padded_vocab_size = getattr(args, "padded_vocab_size", None) or sizes_of(shape)["vocab"]
        return Namespace(vocab_size=sizes_of(shape)["vocab"])

    megatron.fused_kernels.load = lambda args: None
    megatron.global_vars.build_tokenizer = tokenizers.build_tokenizer = vocabulary
    random.seed(0)
    torch.manual_seed(0)
    sys.argv = ["checkpoint_util.py", "--model_type", model, "--load_dir", source, "--save_dir", target,
                "--target_tensor_parallel_size", tp, "--target_pipeline_parallel_size", pp,
                "--true_vocab_size", str(sizes_of(shape)["vocab"])]  # fmt: skip
    sys.argv += ["--bf16"] if dtype == "bfloat16" else []
    checkpoint_util.main()


def step_hf(repository: Path, shape: str, model: str, source: str, target: str) -> None:
    """megatron_to_hf.py, without its tokenizer."""
    stand_in(repository)
    import megatron_to_hf as original

    original.write_tokenizer = lambda args: None
    if sizes_of(shape).get("ffn") is None:  # it tells the 40B from the 7B by the number of layers
        new_decoder = tiny_falcon.SHAPES[shape][-1]
        with_constants(original.write_falcon_model, {32: 0, 60: 0} if new_decoder else {})
    sys.argv = ["megatron_to_hf.py", "--input_dir", source, "--output_dir", target, "--model", model]
    original.main()


def step_upgrade(repository: Path, source: str, target: str) -> None:
    """permute_qkv.py."""
    stand_in(repository)
    from utils.permute_qkv import update_checkpoint

    update_checkpoint(Path(source), Path(target))


def step_forward(repository: Path, shape: str, model: str, source: str, target: str) -> None:
    """Its own model, unsharded in one process; the logits go to a file."""
    stand_in(repository)
    import finetune
    import megatron.arguments
    import megatron.core
    import megatron.global_vars
    import megatron.model.fused_layer_norm as norms
    from megatron.checkpointing import load_args_from_checkpoint, load_checkpoint

    one_head = sizes_of(shape)["num_attention_heads_kv"] == 1
    sys.argv = ["finetune.py", "--load", source, "--use_cpu_initialization", "--no_initialization", "--no_load_optim",
                "--no_load_rng", "--micro_batch_size", "1", "--rope_theta", str(THETA), "--layernorm_epsilon", str(EPS),
                "--no_masked_softmax_fusion", "--no_bias_gelu_fusion", "--no_bias_dropout_fusion",
                "--no_gradient_accumulation_fusion", "--no_async_tensor_model_parallel_allreduce"]  # fmt: skip
    args = load_args_from_checkpoint(megatron.arguments.parse_args())
    args.padded_vocab_size = getattr(args, "padded_vocab_size", None) or sizes_of(shape)["vocab"]
    args.use_flash_attn = one_head
    args = megatron.arguments.validate_args(args)
    args.model_name, args.model_type = model, "encoder_or_decoder"
    megatron.global_vars.build_tokenizer = lambda args: None
    megatron.global_vars.set_global_variables(args)
    for name in ("tensor", "pipeline"):
        getattr(megatron.core.mpu, f"set_{name}_model_parallel_world_size")(1)
        getattr(megatron.core.mpu, f"set_{name}_model_parallel_rank")(0)
    megatron.core.mpu._DATA_PARALLEL_GROUP = 0
    megatron.core.mpu.get_global_memory_buffer = lambda: Namespace(get_tensor=lambda size, dtype, _: torch.empty(size))
    megatron.core.tensor_parallel.get_cuda_rng_tracker = lambda: Namespace(fork=contextlib.nullcontext)
    norms.MixedFusedLayerNorm.forward = lambda self, x: torch.nn.functional.layer_norm(
        x, x.shape[-1:], self.weight, self.bias, self.eps
    )
    whole = finetune.model_provider(True, True).eval()
    for layer in whole.language_model.encoder.layers:
        layer.self_attention.core_attention_flash = attention
    load_checkpoint([whole], None, None)
    tokens, positions = torch.tensor(TOKENS), torch.tensor(POSITIONS)
    future = torch.ones(1, 1, len(TOKENS), len(TOKENS)).triu(1).bool()
    with torch.inference_mode():
        _, logits = whole(tokens[None], positions[None], future)
    Path(target).write_text(json.dumps([[float(f"{x:.9g}") for x in logits[0, at].tolist()] for at in LISTED]))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """What flash attention computes: (B, T, H, D) each."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


# --- The cases.


def meta_source(shape: str, directory: Path, dtype: torch.dtype, shards: int) -> None:
    """The tiny checkpoint as Meta's files: neighbouring rotary pairs, columns of wo, w2 and the embedding split."""
    num_heads, head_dim = tiny.SHAPES[shape][2], tiny.SHAPES[shape][4]
    names = {"q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo",
             "gate_proj": "feed_forward.w1", "down_proj": "feed_forward.w2", "up_proj": "feed_forward.w3",
             "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    outside = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
               "lm_head.weight": "output.weight"}  # fmt: skip
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, tensor in tiny.state_dict(shape, dtype).items():
        words = name.split(".")
        meta = outside.get(name) or f"layers.{words[2]}.{names[words[-2]]}.weight"
        if words[-2] in ("q_proj", "k_proj"):
            tensor = tensor.view(-1, 2, head_dim // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        columns = meta.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
        pieces = [tensor] * shards if tensor.ndim == 1 else tensor.chunk(shards, 1 if columns else 0)
        for part, piece in zip(parts, pieces, strict=True):
            part[meta] = piece.clone()
    directory.mkdir(parents=True)
    for number, part in enumerate(parts):
        torch.save(part, directory / f"consolidated.{number:02d}.pth")
    assert num_heads * head_dim == tiny.SHAPES[shape][1]


def make_source(name: str, shape: str, dtype: torch.dtype, directory: Path) -> None:
    if "meta" in name:
        meta_source(shape, directory, dtype, 2 if "shards" in name else 1)
    else:
        (tiny if shape in tiny.SHAPES else tiny_falcon).write(shape, directory, dtype)


def step(repository: Path, *words: object) -> None:
    environment = os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--repository", str(repository), "--step", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-6000:]}")


def run_case(repository: Path, name: str, work: Path) -> list[dict]:
    """All steps of a case, each listed."""
    shape, dtype, model, size, steps = CASES[name]
    source, target = work / name / "source", work / name / "0"
    make_source(name, shape, getattr(torch, dtype), source)
    old = "old" in name
    step(repository, "convert", shape, model, size, source, target, "old" if old else "new")
    how = f"hf_to_megatron.py {model} --size {size}" + (", its permute left out" if old else "")
    found = [listed(name, how, 1, 1, target)]
    if name in FORWARD:
        step(repository, "forward", shape, model, target, work / name / "logits")
        case = {"case": name, "shape": shape, "dtype": dtype, "tp": 1, "pp": 1, "direction": "forward from step 0"}
        case |= {"rope_theta": THETA, "layernorm_epsilon": EPS, "tokens": TOKENS, "positions": POSITIONS}
        found.append(case | {"listed": LISTED, "logits": json.loads((work / name / "logits").read_text())})
    for number, (what, *layout) in enumerate(steps, 1):
        source, target = target, work / name / str(number)
        if what in ("reshard", "on"):
            step(repository, "reshard", shape, model, *layout, source, target, dtype)
            how = f"checkpoint_util.py from step {number - 1}"
        elif what == "upgrade":
            step(repository, "upgrade", source, target)
            layout, how = steps[number - 2][1:], f"permute_qkv.py from step {number - 1}"
        else:
            step(repository, "hf", shape, model, source, target)
            layout, how = (1, 1), f"megatron_to_hf.py --model {model} from step {number - 1}"
        if what != "on":
            found.append(listed(name, how, *layout, target))
    return found


def run_failure(repository: Path, name: str, work: Path) -> str:
    """The last line that the original says."""
    shape, model, size, then = FAILS[name]
    source, target = work / name / "source", work / name / "0"
    make_source("", shape, torch.float32, source)
    try:
        step(repository, "convert", shape, model, size, source, target, "new")
        if then == "upgrade":
            step(repository, "upgrade", target, work / name / "1")
        elif then == "reshard":
            step(repository, "reshard", shape, model, 4, 1, target, work / name / "1", "float32")
        else:
            step(repository, "hf", shape, model, target, work / name / "1")
    except SystemExit as error:
        return str(error).strip().splitlines()[-1]
    return "no error"


def listed(name: str, how: str, tp: int, pp: int, directory: Path) -> dict:
    """What a step wrote: for each file its tensors' dotted keys, sizes and digests, and what else it holds."""
    shape, dtype = CASES[name][:2]
    case = {"case": name, "shape": shape, "dtype": dtype, "tp": tp, "pp": pp, "direction": how}
    files, rest = {}, {}
    for path in sorted(directory.rglob("*.pt")):
        entries, others = {}, {}
        walk(torch.load(path, weights_only=False), (), entries, others)
        files[str(path.relative_to(directory))] = entries
        rest[str(path.relative_to(directory))] = others
    for path in sorted(directory.rglob("*.safetensors")):
        from safetensors.torch import load_file

        files[path.name] = {key: entry(tensor) for key, tensor in load_file(path).items()}
    tracker = directory / "latest_checkpointed_iteration.txt"
    if tracker.exists():
        case["latest_checkpointed_iteration.txt"] = tracker.read_text()
    if rest:
        first, *others = rest.values()
        case["other content"] = first
        case["other content of the other ranks that differs"] = [
            {key: value for key, value in other.items() if first.get(key) != value} for other in others
        ]
    if (directory / "config.json").exists():
        case["config.json"] = json.loads((directory / "config.json").read_text())
    return case | {"files": files}


def entry(tensor: torch.Tensor) -> dict:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "sha256": tiny.digest(tensor)}


def walk(value: object, path: tuple[str, ...], entries: dict, others: dict) -> None:
    """Tensors by dotted key, without "model."; as keys have dots, outside the layers the dictionaries' levels by |."""
    if isinstance(value, torch.Tensor):
        levels = {} if ".layers." in ".".join(path) else {"levels": "|".join(path)}
        entries[".".join(path[1:])] = entry(value) | levels
    elif isinstance(value, dict):
        for key, below in value.items():
            walk(below, (*path, str(key)), entries, others)
    elif isinstance(value, Namespace):
        here = {key: plain(below) for key, below in sorted(vars(value).items()) if key not in ("save", "load")}
        others["|".join(path)] = here
    else:
        others["|".join(path)] = plain(value)


def shorten(cases: list[dict]) -> None:
    """Of the 219 args that saving writes, the first case has all, and the later ones those that differ from it."""
    first = None
    for case in cases:
        args = case.get("other content", {}).get("args", {})
        if len(args) > 100 and first:
            case["other content"]["args"] = {"as in the first of its kind, but": None} | {
                key: value for key, value in args.items() if first.get(key, "absent") != value
            }
        elif len(args) > 100:
            first = args


def plain(value: object) -> object:
    if isinstance(value, enum.Enum):
        return f"enum {type(value).__module__}.{value}"
    known = value is None or isinstance(value, (bool, int, float, str, list))
    return value if known else f"{type(value).__name__} {value}"


def text(document: dict) -> str:
    """JSON with one line per tensor."""
    plain_lists = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(document, indent=1))
    return re.sub(r'\{\s*"shape"[^{}]*\}', lambda found: " ".join(found[0].split()), plain_lists) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/proof/megatron_llm.json"))
    parser.add_argument("--work", type=Path, help="keep the files here")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        globals()[f"step_{arguments.step[0]}"](arguments.repository.resolve(), *arguments.step[1:])
        return
    stand_in(arguments.repository.resolve())  # the args that it saves are unpickled with its own classes
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        cases = [case for name in CASES for case in run_case(arguments.repository.resolve(), name, work.resolve())]
        failures = {name: run_failure(arguments.repository.resolve(), name, work.resolve()) for name in FAILS}
    shorten(cases)
    document = {"system": "epfLLM/Megatron-LLM", "commit": COMMIT, "torch": torch.__version__, "failures": failures}
    document["cases"] = cases
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text(document))


if __name__ == "__main__":
    main()
