"""make_hf_weights.py NAME LLAMA CORPUS OUTPUT: a tiny model of another family, as the Hugging Face hub has its like.

The weights are random: a valid checkpoint of a model that knows nothing yet. The tokenizer is the one in LLAMA; but
Qwen's are byte-level BPE without a tokenizer.model, and transformers takes no other for them: made from CORPUS.
"""

import json
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Tokenizer

TOKENIZER_DOCUMENTS = 100

COMMON: dict[str, Any] = {
    "vocab_size": 1500,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_LIKE = COMMON | {"num_key_value_heads": 2, "intermediate_size": 352}
QWEN_LIKE = LLAMA_LIKE | {"bos_token_id": None, "eos_token_id": 0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # As 7B: one KV head, one norm for attention and MLP.
    "tiny_falcon": ("falcon", COMMON | {"multi_query": True, "new_decoder_architecture": False}),
    # As 40B and 180B: KV heads shared by groups, a norm each.
    "tiny_falcon_new": ("falcon", COMMON | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "tiny_mistral": ("mistral", LLAMA_LIKE | {"sliding_window": 48}),
    "tiny_qwen2": ("qwen2", QWEN_LIKE | {"tie_word_embeddings": True}),
    "tiny_qwen3": ("qwen3", QWEN_LIKE | {"head_dim": 48}),
    "tiny_llama3": ("llama", LLAMA_LIKE | {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
}


def model(name: str) -> PreTrainedModel:
    """A model of transformers' own; norms and biases are moved from one and zero, where a lost one would not show."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.05
    return made


def byte_level_tokenizer(corpus: Path, directory: Path) -> None:
    """Qwen's kind of tokenizer, trained on the corpus; transformers takes no other in a Qwen2 directory."""
    with corpus.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in islice(file, TOKENIZER_DOCUMENTS)]
    fast = Qwen2Tokenizer().train_new_from_iterator(texts, COMMON["vocab_size"], show_progress=False)
    fast.save_pretrained(directory)


def main() -> None:
    name, llama, corpus, output = sys.argv[1], *map(Path, sys.argv[2:])
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model(name).save_pretrained(part)
    if "qwen" in name:
        byte_level_tokenizer(corpus, part)
    else:
        shutil.copy(llama / "tokenizer.model", part)
    shutil.rmtree(output, ignore_errors=True)
    part.replace(output)


main()
