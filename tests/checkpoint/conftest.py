"""A tiny grouped-query Llama made by transformers, the same weights as Meta would ship them, and a real tokenizer."""

import argparse
import inspect
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, THETA = 509, 32, 48, 4, 8, 2, 5e5
HEAD_DIM = HIDDEN // HEADS
# Meta's names, and the dimension that its model-parallel ranks split; None: whole in each.
META = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 1),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
    "input_layernorm.weight": ("attention_norm.weight", None),
    "self_attn.q_proj.weight": ("attention.wq.weight", 0),
    "self_attn.k_proj.weight": ("attention.wk.weight", 0),
    "self_attn.v_proj.weight": ("attention.wv.weight", 0),
    "self_attn.o_proj.weight": ("attention.wo.weight", 1),
    "post_attention_layernorm.weight": ("ffn_norm.weight", None),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", 0),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", 1),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", 0),
}


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE of Llama's kind, trained on a module's source."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text").write_text(inspect.getsource(argparse))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def hf_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that transformers wrote; float32, no tokenizer."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # else they are all ones
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    path = tmp_path_factory.mktemp("hf") / "llama"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def hf_tensors(hf_llama: Path) -> dict[str, torch.Tensor]:
    return load_file(hf_llama / "model.safetensors")


@pytest.fixture
def hf(hf_llama: Path, tmp_path: Path) -> Path:
    """A copy of `hf_llama` that a test may damage."""
    return shutil.copytree(hf_llama, tmp_path / "hf")


def interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Half-split rotary order to Meta's, row by row."""
    out = torch.empty_like(weight)
    head_dim = weight.shape[0] // num_heads
    for head in range(num_heads):
        for pair in range(head_dim // 2):
            out[head * head_dim + 2 * pair] = weight[head * head_dim + pair]
            out[head * head_dim + 2 * pair + 1] = weight[head * head_dim + head_dim // 2 + pair]
    return out


def meta_name(name: str) -> tuple[str, int | None]:
    if not name.startswith("model.layers."):
        return META[name]
    _, _, layer, rest = name.split(".", 3)
    ours, dim = META[rest]
    return f"layers.{layer}.{ours}", dim


def write_meta(
    path: Path, tensors: dict[str, torch.Tensor], shards: int, embedding_dim: int = 1, **params: object
) -> Path:
    """The same model as Meta would ship it, in `shards` model-parallel files."""
    path.mkdir()
    files: list[dict[str, torch.Tensor]] = [{"rope.freqs": torch.arange(HEAD_DIM // 2)} for _ in range(shards)]
    for name, tensor in tensors.items():
        ours, dim = meta_name(name)
        if ours == "tok_embeddings.weight":
            dim = embedding_dim
        if name.endswith("q_proj.weight"):
            tensor = interleave(tensor, HEADS)
        if name.endswith("k_proj.weight"):
            tensor = interleave(tensor, KV_HEADS)
        for shard, file in enumerate(files):
            if dim is None:
                file[ours] = tensor.clone()
            else:
                each = -(-tensor.shape[dim] // shards)
                index = torch.arange(shard * each, min((shard + 1) * each, tensor.shape[dim]))
                file[ours] = tensor.index_select(dim, index)
    for shard, file in enumerate(files):
        torch.save(file, path / f"consolidated.{shard:02d}.pth")
    values = {
        "dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "norm_eps": 1e-5,
        "rope_theta": THETA, "multiple_of": 16, "vocab_size": -1,
    }  # fmt: skip
    (path / "params.json").write_text(json.dumps(values | params))
    return path


@pytest.fixture
def meta(tmp_path: Path, hf_tensors: dict[str, torch.Tensor]) -> Path:
    """Two model-parallel shards, as the demo has."""
    return write_meta(tmp_path / "meta", hf_tensors, 2)
