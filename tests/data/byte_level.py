"""A tokenizer.json of byte-level BPE, as the `tokenizers` library makes it."""

import json
from pathlib import Path

from data_help import TEXT
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers


def byte_level(path: Path, pattern: str | None, composed: bool = False, whole: bool = False) -> Path:
    """A tokenizer.json of the `tokenizers` library's own making, with a token that its merges do not make."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    after = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), after] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split) if pattern else after
    tokenizer.normalizer = normalizers.NFC() if composed else None
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator([*TEXT, "\u4e2d\u6587 \u00e9t\u00e9"], trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"]["ambiguity"] = 450
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path / "tokenizer.json"
