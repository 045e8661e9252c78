"""A tiny model and a tiny dataset, made without llmpipe's converters: transformers and hand-written bytes."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmpipe.checkpoint import manifest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "LLMPIPE_SLOW" not in os.environ:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: make drill"))


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """What a test sets in the environment ends with it: evaluate goes offline for the rest of its process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


VOCAB = 203  # odd, so that the vocabulary's slices differ in size


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a random grouped-query Llama."""
    return save_llama(tmp_path_factory.mktemp("checkpoint"), hidden=32)


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with heads as wide as flex attention wants them at least on a GPU, 16."""
    return save_llama(tmp_path_factory.mktemp("wide_checkpoint"), hidden=64)


def save_llama(directory: Path, hidden: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=hidden * 3 // 2, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
        initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    manifest.write(directory, "checkpoint", {})
    return directory


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of a dataset of 400 random documents."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "corpus", seed=0)


@pytest.fixture(scope="session")
def other_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of other documents, for blends."""
    return write_dataset(tmp_path_factory.mktemp("other_dataset") / "other", seed=1)


def write_dataset(prefix: Path, seed: int) -> Path:
    """Byte by byte in Megatron's format."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 40, 400).astype("<i4")
    # Each token follows from the one before, with noise, so that there is something to learn.
    tokens = (np.cumsum(rng.integers(1, 4, sizes.sum())) * 7 % VOCAB).astype("<u2")
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    pointers = np.concatenate([[0], np.cumsum(sizes[:-1].astype("<i8")) * 2]).astype("<i8")
    documents = np.arange(len(sizes) + 1, dtype="<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(sizes), len(documents))
    prefix.with_suffix(".idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + documents.tobytes())
    return prefix
