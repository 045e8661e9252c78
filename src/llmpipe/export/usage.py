"""How the original systems read an exported model: their own command lines, for the model card.

Sources: the README and scripts of each repository, and the list of settings that its loader takes from a checkpoint's
args (`load_args_from_checkpoint`): what is not on that list has to be said again, and stands in the command.
"""

from pathlib import Path

import torch

from llmpipe.checkpoint.convert import Target
from llmpipe.checkpoint.easylm_files import WEIGHTS
from llmpipe.checkpoint.meta_params import by_rows
from llmpipe.export.usage_megatron import megatron
from llmpipe.export.usage_text import HERE, Usage, command
from llmpipe.families import Shape

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def usage(target: Target, shape: Shape, dtype: torch.dtype, directory: Path) -> Usage:
    """How the exported `directory`, whose embedding is of type `dtype`, is read."""
    if target.to == "meta":
        return meta(target, shape)
    if target.to == "megatron":
        return megatron(target, shape, dtype, directory)
    return easylm(shape, dtype) if target.to == "easylm" else transformers()


def transformers() -> Usage:
    """A Hugging Face directory."""
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{HERE}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{HERE}")'
    )
    return Usage("a Hugging Face directory", "transformers", code, "python")


def meta(target: Target, shape: Shape) -> Usage:
    """consolidated.*.pth, one process each; which of Meta's repositories reads them hangs on what params.json says."""
    title, torchrun = "Meta's format", f"torchrun --nproc_per_node {target.tp}"
    if shape.rope_scaling:
        options = [f"{HERE}", f"--world_size {target.tp}"]
        line = command(f"{torchrun} -m models.llama3.scripts.completion", options)
        note = (
            "This code takes the tokenizer that comes with it, Llama 3's, and asks that the vocabulary is of its size;"
            f" this model has {shape.vocab} tokens"
        )
        return Usage(title, "github.com/meta-llama/llama-models, in its folder", line, notes=(note,))
    name, script = ("llama3", "example_text_completion.py") if by_rows(shape) else _of_theta(shape)
    options = [f"--ckpt_dir {HERE}", f"--tokenizer_path {HERE}/tokenizer.model"]
    options += [f"--max_seq_len {min(512, shape.max_positions)}", "--max_batch_size 4"]
    note = f"This code takes the vocabulary's size from tokenizer.model, which has to have {shape.vocab} tokens"
    line = command(f"{torchrun} {script}", options)
    return Usage(title, f"github.com/meta-llama/{name}, in its folder", line, notes=(note,))


def _of_theta(shape: Shape) -> tuple[str, str]:
    """Llama 2's code takes 10000 for theta; CodeLlama's, which is the same but for that, reads params.json's."""
    return (
        ("llama", "example_text_completion.py") if shape.rope_theta == 1e4 else ("codellama", "example_completion.py")
    )


def easylm(shape: Shape, dtype: torch.dtype) -> Usage:
    """A streaming file: nothing in it says the shape, so that the command has to."""
    sizes = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "max_position_embeddings": shape.max_positions,
        "rope_theta": shape.rope_theta,
    }
    options = [f"--load_checkpoint='params::{HERE}/{WEIGHTS}'", f"--tokenizer='{HERE}'"]
    options += [f"--param_dtype={_DTYPES[dtype]}", f"--dtype={_DTYPES[dtype]}"]
    options += [f"--input_length={shape.max_positions // 2}", f"--seq_length={shape.max_positions}"]
    options += ["--llama.base_model=debug"] + [f"--llama.{name}={value}" for name, value in sizes.items()]
    notes = ("`--llama.base_model` only names what the options after it replace",)
    if shape.rope_theta != 1e4:
        notes += (f"EasyLM computes with rope_theta 10000 whatever it is told; this model has {shape.rope_theta:g}",)
    line = command("python -m EasyLM.models.llama.llama_serve", options)
    return Usage("EasyLM's format", "github.com/young-geng/EasyLM", line, notes=notes)
