"""Megatron-LM's first GPT model (megatron/legacy, --use-legacy-models): nested tables, names of 2019 to 2024."""

from llmpipe.checkpoint.megatron.dialect import GATE_UP, QKV, Dialect
from llmpipe.checkpoint.megatron.nvidia_args import OUTER, UNCERTAIN, read_args, write_legacy_args

_LAYER = "language_model.encoder.layers.{}"
LEGACY = Dialect(
    name="legacy",
    system="Megatron-LM's legacy model",
    names={
        "embedding.weight": "language_model.embedding.word_embeddings.weight",
        "layers.{}.attention_norm.weight": f"{_LAYER}.input_norm.weight",
        f"{QKV}.weight": f"{_LAYER}.self_attention.query_key_value.weight",
        f"{QKV}.bias": f"{_LAYER}.self_attention.query_key_value.bias",
        "layers.{}.attention.o.weight": f"{_LAYER}.self_attention.dense.weight",
        "layers.{}.attention.o.bias": f"{_LAYER}.self_attention.dense.bias",
        "layers.{}.mlp_norm.weight": f"{_LAYER}.post_attention_norm.weight",
        f"{GATE_UP}.weight": f"{_LAYER}.mlp.dense_h_to_4h.weight",
        f"{GATE_UP}.bias": f"{_LAYER}.mlp.dense_h_to_4h.bias",
        "layers.{}.mlp.down.weight": f"{_LAYER}.mlp.dense_4h_to_h.weight",
        "layers.{}.mlp.down.bias": f"{_LAYER}.mlp.dense_4h_to_h.bias",
        "norm.weight": "language_model.encoder.final_norm.weight",
        "head.weight": "language_model.output_layer.weight",
    },
    aliases=(  # before 2023
        (r"^language_model\.transformer\.", "language_model.encoder."),
        (r"(\.layers\.\d+)\.attention\.", r"\1.self_attention."),
        (r"\.(input|post_attention|final)_layernorm\.", r".\1_norm."),
    ),
    marks=(r"^language_model\..*\.query_key_value\.weight$",),
    unlike=(r"rmsnorm", r"lm_head", r"mlp_layernorm"),
    args_marks=("swiglu",),
    families=("llama", "mistral", "qwen2"),
    tied_head="word_embeddings_for_head.weight",
    tables=(
        "language_model",
        "language_model.embedding",
        "language_model.embedding.word_embeddings",
        "language_model.encoder",
        "language_model.output_layer",
        "word_embeddings_for_head",
    ),
    outer=OUTER,
    folder="iter_0000001",
    read_args=read_args,
    uncertain=UNCERTAIN,
    write_args=write_legacy_args,
)
