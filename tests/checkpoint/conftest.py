"""A tiny grouped-query Llama made by transformers, the same weights as Meta would ship them, and a real tokenizer."""

import argparse
import inspect
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from meta_files import FFN, HEADS, HIDDEN, KV_HEADS, LAYERS, THETA, VOCAB, write_meta
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()


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


@pytest.fixture
def meta(tmp_path: Path, hf_tensors: dict[str, torch.Tensor]) -> Path:
    """Two model-parallel shards, as the demo has."""
    return write_meta(tmp_path / "meta", hf_tensors, 2)
