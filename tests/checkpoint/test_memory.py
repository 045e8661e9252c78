"""Anonymous memory of every path, on a model whose embedding alone is larger than the limit (design decision 4)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.distributed.checkpoint.state_dict_saver import save

from llmpipe.checkpoint.containers.safetensors_file import Entry, header_bytes
from megatron_lm_files import stacked

HIDDEN, FFN, HEADS, VOCAB = 2048, 512, 16, 150_000
LIMIT = 500e6

# `step` prints its name and the highest anonymous resident memory above what it was before all, in bytes.
BEFORE = """
import gc, os, shutil, sys, threading, time
from dataclasses import replace
from pathlib import Path
import torch
from llmpipe.checkpoint import mover
from llmpipe.checkpoint.changes import Changes
from llmpipe.checkpoint.convert import Target, convert, merge, shard
from llmpipe.checkpoint.diff import diff
from llmpipe.checkpoint.formats import Told
from llmpipe.families import from_hf_config
from llmpipe.layout import Stages
from llmpipe.verify.megatron import MegatronModel
from llmpipe.verify.meta import MetaModel
from llmpipe.verify.round_trip import round_trip_checks

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

def watch():
    while True:
        samples.append(anonymous())
        time.sleep(0.01)

def holes(descriptor, chunk, offset=None):  # zeros need not reach the disk
    if chunk.any():
        write_all(descriptor, chunk, offset)
    elif offset is None:
        os.ftruncate(descriptor, os.lseek(descriptor, len(chunk), os.SEEK_CUR))

gc.set_threshold(50_000, 20)  # as a command has it, by cli.main
write_all, mover._write_all = mover._write_all, holes
before, samples = anonymous(), []
threading.Thread(target=watch, daemon=True).start()
folder = Path(sys.argv[1])
shape = from_hf_config(__import__("json").loads((folder / "hf/config.json").read_text()))
told = Told(shape)

def step(name, work, *done_with):
    samples.clear()
    work()
    print(name, max([*samples, anonymous()]) - before, flush=True)
    for path in done_with:
        shutil.rmtree(folder / path)

def to(name, source, *target, told=told, hashed=False, **more):
    return lambda: convert(folder / source, folder / name, Target(*target), told, hashed, **more)

def way_back(name, checkpoint, source):
    checks = []
    step(name, lambda: checks.extend(round_trip_checks(folder / checkpoint, source, {})[0]))
    assert checks[0].value == 0, checks

plain = Told()
"""
STEPS = """
assumed = {"query heads": shape.num_heads, "norm eps": 1e-5, "rope theta": 1e4, "vocabulary": shape.vocab}
step("hf, cast, hashed", to("cast", "hf", "hf", "mcore", 1, Stages(), torch.float16, told=plain, hashed=True), "cast")
step("adapter merged", to("merged", "hf", "hf", changes=Changes(folder / "adapter")), "merged")
step("hf to meta", to("meta", "hf", "meta", "mcore", 2))
step("meta to hf", to("checkpoint", "meta", "hf"))
way_back("back to meta", "checkpoint", MetaModel(folder / "meta"))
shutil.rmtree(folder / "meta")
step("diff", lambda: diff(folder / "hf", folder / "checkpoint"))
step("shard", lambda: shard(folder / "checkpoint", folder / "ranks", 2, Stages(1), False), "checkpoint")
step("merge", lambda: merge(folder / "ranks", folder / "merged"), "ranks", "merged")
step("hf to mcore", to("mcore", "hf", "megatron", "mcore", 2))
step("mcore to hf, cast", to("out", "mcore", "hf", "mcore", 1, Stages(), torch.float16))
way_back("back to mcore, cast", "out", MegatronModel(folder / "mcore", assumed=assumed))
shutil.rmtree(folder / "out"), shutil.rmtree(folder / "mcore")
step("hf to easylm", to("easylm", "hf", "easylm"))
step("easylm to hf", to("out", "easylm", "hf"), "out", "easylm")
"""
MORE_STEPS = """
step(".bin to hf", to("out", "bin", "hf"), "out")
step("torch_dist to hf", to("out", "torch_dist", "hf"), "out")
step("tokens added", to("out", "words", "hf", changes=Changes(tokens=("<|im_start|>",)), told=plain), "out")
told = Told(replace(shape, tie_embeddings=False))
for dialect in ("legacy", "epf", "ali", "mfz"):
    step(f"hf to {dialect}", to(dialect, "untied", "megatron", dialect, 2, told=plain))
    step(f"{dialect} to hf", to("out", dialect, "hf", told=told), "out", dialect)
"""


def sizes_of(tied: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama of one layer."""
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    sizes |= {} if tied else {"lm_head.weight": (VOCAB, HIDDEN)}
    layer = "model.layers.0."
    sizes |= {layer + f"self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
    sizes |= {layer + f"mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
    sizes[layer + "mlp.down_proj.weight"] = (HIDDEN, FFN)
    sizes |= {layer + f"{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return sizes | {"model.norm.weight": (HIDDEN,)}


def write_sparse(path: Path, tied: bool = True) -> None:
    """The Llama, all its weights a hole in one file."""
    entries = [Entry(name, torch.bfloat16, size) for name, size in sizes_of(tied).items()]
    header = header_bytes(entries, {"format": "pt"})
    write_config(path, tied)
    with (path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(entry.bytes for entry in entries))


def write_config(path: Path, tied: bool = True) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": tied,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))


def write_other_containers(folder: Path) -> None:
    """The same as torch saves it, and as Megatron-LM does by default."""
    tensors = {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in sizes_of(tied=True).items()}
    write_config(folder / "bin")
    torch.save(tensors, folder / "bin/pytorch_model.bin")
    save(stacked(tensors, HEADS, 1), checkpoint_id=folder / "torch_dist", no_dist=True)
    (folder / "torch_dist/metadata.json").write_text("{}")


def write_words(path: Path) -> None:
    """A tokenizer of as many words as there are rows."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    words.save(str(path / "tokenizer.json"))


def write_adapter(path: Path) -> None:
    """LoRA of rank 4 on one matrix: a computed source."""
    path.mkdir()
    tensors = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, HIDDEN),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(HIDDEN, 4),
    }
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))


def measured(steps: str, folder: Path) -> dict[str, int]:
    """Bytes of each step, by name."""
    assert VOCAB * HIDDEN * 2 > 600e6 > LIMIT
    command = [sys.executable, "-c", BEFORE + steps, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: int(size) for name, size in (line.rsplit(" ", 1) for line in done.stdout.splitlines())}


def assert_a_few_buffers(grown: dict[str, int]) -> None:
    assert max(grown.values()) > 1e6  # it was looked at
    assert all(size < LIMIT for size in grown.values()), grown


def test_anonymous_memory_is_a_few_buffers_in_every_path(tmp_path: Path) -> None:
    write_sparse(tmp_path / "hf")
    write_adapter(tmp_path / "adapter")
    grown = measured(STEPS, tmp_path)
    assert len(grown) == 13
    assert_a_few_buffers(grown)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_it_is_in_every_other_container_and_dialect(tmp_path: Path) -> None:
    write_sparse(tmp_path / "hf")
    write_sparse(tmp_path / "untied", tied=False)
    write_sparse(tmp_path / "words")
    write_words(tmp_path / "words")
    write_other_containers(tmp_path)
    grown = measured(MORE_STEPS, tmp_path)
    assert len(grown) == 11
    assert_a_few_buffers(grown)
