"""A tiny grouped-query Llama of transformers with a real tokenizer, and a dataset, for the later stages' tests."""

import argparse
import inspect
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from llmpipe.checkpoint.convert import convert
from llmpipe.data.dataset import manifest
from llmpipe.data.dataset.indexed import Writer
from llmpipe.files import sha256

VOCAB = 384
POSITIONS = 128
TEXT = inspect.getsource(argparse)

disable_progress_bar()


def make_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint in `folder`/checkpoint; its weights are transformers' own, from `folder`/source."""
    source = folder / "source"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(source)
    make_tokenizer(source)
    convert(source, folder / "checkpoint")
    return folder / "checkpoint"


def make_tokenizer(folder: Path) -> None:
    """A SentencePiece BPE of Llama's kind."""
    (folder / "text").write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=VOCAB, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2,
    )  # fmt: skip


def make_dataset(checkpoint: Path, prefix: Path) -> Path:
    """A dataset of the blocks of a source file, tokenized by SentencePiece with BOS and EOS."""
    path = checkpoint / "tokenizer.model"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    documents = [[1, *tokenizer.encode(block), 2] for block in TEXT.split("\n\n\n")[:40]]
    with Writer(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.concatenate(documents), np.array([len(document) for document in documents]))
    facts = {"path": str(path), "sha256": sha256(path), "vocab_size": VOCAB}
    manifest.write(prefix, {"tokenizer": facts, "documents": len(documents)})
    return prefix
