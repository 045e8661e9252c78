"""How Megatron-LM and the forks of it read an exported model: their options, for the model card.

Megatron-LM's and Megatron-LLM's loaders take the sizes from the checkpoint with --use-checkpoint-args; rope theta, norm
eps, scaling, windows and uneven stages are not among what they take. Both Megatron-LLaMAs take everything from the
command line.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from llmpipe.checkpoint.convert import Target
from llmpipe.checkpoint.megatron.dialects import named
from llmpipe.checkpoint.megatron.write import VOCAB_MULTIPLE
from llmpipe.data.tokenizers.ranks import is_tiktoken
from llmpipe.export.usage_text import HERE, Usage, command
from llmpipe.families import Shape

_HALF = {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}
_TRAINING = "It is Megatron's own training that reads it: add the data's and the optimizer's arguments of your own"


def megatron(target: Target, shape: Shape, dtype: torch.dtype, directory: Path) -> Usage:
    """The command of the dialect's system, for as many processes as the directory has ranks."""
    model = directory / "tokenizer.model"
    pieces = model.is_file() and not is_tiktoken(model)
    options, program, notes = _DIALECTS[target.dialect](target, shape, pieces)
    half = _HALF.get(dtype, [])
    torchrun = f"torchrun --nproc_per_node {target.tp * target.stages.pp} {program}"
    line = f"CUDA_DEVICE_MAX_CONNECTIONS=1 {torchrun}"
    system = named(target.dialect).system
    return Usage(
        f"a directory of {system}", f"{_WHERE[target.dialect]}, in its folder", command(line, options + half), "sh",
        notes,
    )  # fmt: skip


_Options = tuple[list[str], str, tuple[str, ...]]
_WHERE = {
    "mcore": "github.com/NVIDIA/Megatron-LM",
    "legacy": "github.com/NVIDIA/Megatron-LM of before May 2026, when its legacy model was taken out",
    "epf": "github.com/epfLLM/Megatron-LLM",
    "ali": "github.com/alibaba/Megatron-LLaMA",
    "mfz": "github.com/MinfanZhao/Megatron-LM_, branch llama-sft",
}


def _layout(target: Target, shape: Shape, dash: str = "-") -> list[str]:
    """Ranks and stages; `dash`: Megatron-LLM has _ in its options' names."""
    stages, layers = target.stages, target.stages.layers
    found = [f"--tensor-model-parallel-size {target.tp}", f"--pipeline-model-parallel-size {stages.pp}"]
    if stages.vp > 1:
        found.append(f"--num-layers-per-virtual-pipeline-stage {shape.num_layers // (stages.pp * stages.vp)}")
    if layers:
        found.append(f"--decoder-first-pipeline-num-layers {layers[0]}")
        found.append(f"--decoder-last-pipeline-num-layers {layers[-1]}")
    return [f"--{option[2:].replace('-', dash)}" for option in found]


def _megatron_lm(target: Target, shape: Shape, pieces: bool) -> _Options:
    """Its text generation server, which loads as training does."""
    options = [f"--load {HERE}", "--ckpt-format torch", "--use-checkpoint-args", "--exit-on-missing-checkpoint"]
    options += ["--no-load-optim", "--no-load-rng", *_layout(target, shape)]
    tokenizer, path = ("Llama2Tokenizer", f"{HERE}/tokenizer.model") if pieces else ("HuggingFaceTokenizer", HERE)
    options += [f"--tokenizer-type {tokenizer}", f"--tokenizer-model {path}", "--micro-batch-size 1"]
    options += [f"--norm-epsilon {shape.norm_eps:g}", *_rope(shape)]
    options += ["--qk-layernorm"] if shape.qk_norm else []
    options += [f"--window-size {shape.window - 1},0"] if shape.window else []
    options += ["--use-legacy-models", "--transformer-impl local"] if target.dialect == "legacy" else []
    notes = ("Training (`pretrain_gpt.py`) reads it with the same arguments; `--finetune` begins at iteration 0",)
    return options, "tools/run_text_generation_server.py", notes


def _rope(shape: Shape) -> list[str]:
    scaling = shape.rope_scaling or {}
    found = ["--position-embedding-type rope", f"--rotary-base {shape.rope_theta:.0f}"]
    if scaling.get("rope_type") == "llama3":
        return [*found, "--use-rope-scaling", f"--rope-scaling-factor {scaling['factor']:g}"]
    return found + ([f"--rotary-seq-len-interpolation-factor {scaling['factor']:g}"] if scaling else [])


def _megatron_llm(target: Target, shape: Shape, _: bool) -> _Options:
    """Its finetune.py: its server does not run Llama."""
    falcon = shape.family == "falcon"
    options = [f"--model_name {'llama2' if shape.family == 'llama' else shape.family}", f"--load {HERE}", "--finetune"]
    options += ["--use_checkpoint_args", "--no_load_optim", "--no_load_rng", *_layout(target, shape, "_")]
    if falcon:
        options += ["--tokenizer_type FalconTokenizer", "--parallel_attn", "--use_flash_attn"]
    else:
        options += ["--tokenizer_type SentencePieceTokenizer", f"--vocab_file {HERE}/tokenizer.model"]
        options += ["--no_new_tokens", "--use_rms_norm", "--glu_activation swiglu", "--no_tie_embed_logits"]
    options += [f"--layernorm_epsilon {shape.norm_eps:g}", f"--rope_theta {shape.rope_theta:g}"]
    options += [f"--rope_scaling_factor {(shape.rope_scaling or {'factor': 1})['factor']:g}"]
    options += [f"--sliding_window_size {shape.window}", "--use_flash_attn"] if shape.window else []
    notes = (_TRAINING, "`--no_new_tokens` keeps the vocabulary at the size of tokenizer.model")
    return [*options, "--micro_batch_size 1"], "finetune.py", notes[: 1 if falcon else 2]


def _sizes(shape: Shape) -> list[str]:
    """What both Megatron-LLaMAs take from the command line alone."""
    return [
        f"--num-layers {shape.num_layers}",
        f"--hidden-size {shape.hidden}",
        f"--ffn-hidden-size {shape.ffn}",
        f"--num-attention-heads {shape.num_heads}",
        f"--seq-length {shape.max_positions}",
        f"--max-position-embeddings {shape.max_positions}",
        f"--make-vocab-size-divisible-by {VOCAB_MULTIPLE}",
        "--no-position-embedding",
        "--use-rotary-position-embeddings",
        "--swiglu",
        "--disable-bias-linear",
    ]


def _alibaba(target: Target, shape: Shape, _: bool) -> _Options:
    options = [f"--load {HERE}", "--finetune", "--no-load-optim", "--no-load-rng", *_layout(target, shape)]
    options += [*_sizes(shape), "--RMSNorm", f"--layernorm-epsilon {shape.norm_eps:g}", "--causal-lm"]
    options += ["--tokenizer-type PretrainedFromHF", f"--tokenizer-name-or-path {HERE}", "--micro-batch-size 1"]
    return options, "pretrain_llama.py", (_TRAINING,)


def _minfanzhao(target: Target, shape: Shape, _: bool) -> _Options:
    options = [f"--task LLAMA_SFT --pretrained-checkpoint {HERE}", f"--load {HERE}", "--finetune", "--no-load-optim"]
    options += ["--no-load-rng", *_layout(target, shape), *_sizes(shape)]
    options += ["--use-rmsnorm", f"--rmsnorm-epsilon {shape.norm_eps:g}", "--llama-swiglu", "--rope-style llama"]
    options += ["--no-query-key-layer-scaling"]
    options += [] if shape.tie_embeddings else ["--untie-embeddings-and-output-weights"]
    options += ["--tokenizer-type LLaMASentencePieceTokenizer", f"--tokenizer-model {HERE}/tokenizer.model"]
    return [*options, "--micro-batch-size 1"], "tasks/main.py", (_TRAINING, *_minfanzhao_ffn(shape))


def _minfanzhao_ffn(shape: Shape) -> tuple[str, ...]:
    """Its code computes the MLP's size and does not look at --ffn-hidden-size."""
    computed = 256 * ((int(4 * shape.hidden * 2 / 3) + 255) // 256)
    if computed == shape.ffn:
        return ()
    return (
        f"Its code (megatron/arguments.py) makes an MLP of {computed} rows with --llama-swiglu, whatever"
        f" --ffn-hidden-size says; this model has {shape.ffn}: change it there",
    )


_DIALECTS: dict[str, Callable[[Target, Shape, bool], _Options]] = {
    "mcore": _megatron_lm,
    "legacy": _megatron_lm,
    "epf": _megatron_llm,
    "ali": _alibaba,
    "mfz": _minfanzhao,
}
