"""config.json files as their makers published them on the Hugging Face hub, whole, one for each form that is found."""

from typing import Any

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "initializer_range": 0.02, "model_type": "llama",
    "rope_scaling": None, "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_NEW = {"attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1, "mlp_bias": False}
_ROPE3 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
_MISTRAL: dict[str, Any] = _IDS | {
    "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "initializer_range": 0.02, "model_type": "qwen2", "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
}  # fmt: skip
_FALCON: dict[str, Any] = {
    "alibi": False, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "bias": False,
    "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "parallel_attn": True, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 65024,
}  # fmt: skip
_REMOTE = {"AutoConfig": "configuration_RW.RWConfig", "AutoModelForCausalLM": "modelling_RW.RWForCausalLM"}

CONFIGS: dict[str, dict[str, Any]] = {
    "huggyllama/llama-7b": _LLAMA | _IDS | _7B | {
        "max_position_embeddings": 2048, "max_sequence_length": 2048, "pad_token_id": 0, "rms_norm_eps": 1e-06,
        "torch_dtype": "float16", "transformers_version": "4.28.0.dev0", "vocab_size": 32000,
    },
    "meta-llama/Llama-2-70b-hf": _LLAMA | _IDS | {
        "_name_or_path": "meta-llama/Llama-2-70b-hf", "hidden_size": 8192, "intermediate_size": 28672,
        "max_position_embeddings": 4096, "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0",
        "vocab_size": 32000,
    },
    "codellama/CodeLlama-34b-hf": _LLAMA | _IDS | {
        "hidden_size": 8192, "intermediate_size": 22016, "max_position_embeddings": 16384, "num_attention_heads": 64,
        "num_hidden_layers": 48, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000, "torch_dtype": "bfloat16", "transformers_version": "4.32.0.dev0", "vocab_size": 32000,
    },
    "meta-llama/Meta-Llama-3-70B-Instruct": _LLAMA | {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128009,
        "hidden_size": 8192, "intermediate_size": 28672, "max_position_embeddings": 8192, "num_attention_heads": 64,
        "num_hidden_layers": 80, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0, "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0", "vocab_size": 128256,
    },
    "meta-llama/Llama-3.1-405B": _LLAMA | _NEW | {
        "bos_token_id": 128000, "eos_token_id": 128001, "hidden_size": 16384, "intermediate_size": 53248,
        "max_position_embeddings": 131072, "num_attention_heads": 128, "num_hidden_layers": 126,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": _ROPE3, "rope_theta": 500000.0,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "vocab_size": 128256,
    },
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA | _NEW | {
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 128, "hidden_size": 3072,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 24,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": _ROPE3 | {"factor": 32.0}, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "vocab_size": 128256,
    },
    "unsloth/Llama-3.3-70B-Instruct": _LLAMA | _NEW | {
        "_attn_implementation_autoset": True, "bos_token_id": 128000, "eos_token_id": 128009, "head_dim": 128,
        "hidden_size": 8192, "intermediate_size": 28672, "max_position_embeddings": 131072, "num_attention_heads": 64,
        "num_hidden_layers": 80, "num_key_value_heads": 8, "pad_token_id": 128004, "rms_norm_eps": 1e-05,
        "rope_scaling": _ROPE3, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "transformers_version": "4.48.3",
        "unsloth_fixed": True, "vocab_size": 128256,
    },
    "01-ai/Yi-34B": _LLAMA | _IDS | {
        "hidden_size": 7168, "intermediate_size": 20480, "max_position_embeddings": 4096, "num_attention_heads": 56,
        "num_hidden_layers": 60, "num_key_value_heads": 8, "pad_token_id": 0, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_theta": 5000000.0, "torch_dtype": "bfloat16", "transformers_version": "4.34.0",
        "vocab_size": 64000,
    },
    "openlm-research/open_llama_3b": {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 3200, "initializer_range": 0.02, "intermediate_size": 8640, "max_position_embeddings": 2048,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 26, "pad_token_id": 0,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.30.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _LLAMA | _IDS | {
        "attention_bias": False, "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048,
        "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "torch_dtype": "bfloat16", "transformers_version": "4.35.0",
        "vocab_size": 32000,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": _LLAMA | {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 64,
        "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
        "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "vocab_size": 49152,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "deepseek-ai/deepseek-coder-6.7b-base": _LLAMA | _7B | {
        "bos_token_id": 32013, "eos_token_id": 32014, "max_position_embeddings": 16384, "num_key_value_heads": 32,
        "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": {"factor": 4.0, "type": "linear"},
        "rope_theta": 100000, "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "vocab_size": 32256,
    },
    "deepseek-ai/deepseek-llm-67b-base": _LLAMA | {
        "attention_bias": False, "bos_token_id": 100000, "eos_token_id": 100001, "hidden_size": 8192,
        "intermediate_size": 22016, "max_position_embeddings": 4096, "num_attention_heads": 64,
        "num_hidden_layers": 95, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "vocab_size": 102400,
    },
    "lmsys/vicuna-7b-v1.5": _LLAMA | _IDS | _7B | {
        "_name_or_path": "vicuna-7b-v1.5", "max_length": 4096, "max_position_embeddings": 4096,
        "num_key_value_heads": 32, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "torch_dtype": "float16", "transformers_version": "4.31.0", "vocab_size": 32000,
    },
    "internlm/internlm2-7b, rewritten as a Llama": _LLAMA | _IDS | {
        "attn_implementation": "eager", "bias": False, "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pad_token_id": 2, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "rope_theta": 1000000, "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0", "vocab_size": 92544,
    },
    "a fine-tuned Llama, saved by transformers 5": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "dtype": "bfloat16", "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "pad_token_id": None, "pretraining_tp": 1, "quantization_config": None, "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": False,
        "transformers_version": "5.0.0", "unsloth_version": "2025.9.1", "use_cache": False, "vocab_size": 32000,
    },
    "mistralai/Mistral-7B-v0.1": _MISTRAL | {
        "rope_theta": 10000.0, "sliding_window": 4096, "transformers_version": "4.34.0.dev0", "vocab_size": 32000,
    },
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL | {
        "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "transformers_version": "4.42.0",
        "vocab_size": 32768,
    },
    "mistralai/Mistral-Nemo-Base-2407": _MISTRAL | {
        "attention_dropout": 0.0, "head_dim": 128, "hidden_size": 5120, "max_position_embeddings": 128000,
        "num_hidden_layers": 40, "rope_theta": 1000000.0, "sliding_window": None,
        "transformers_version": "4.43.0.dev0", "vocab_size": 131072,
    },
    "mistralai/Mathstral-7B-v0.1": _MISTRAL | {
        "attention_dropout": 0.0, "head_dim": 128, "rope_theta": 1000000.0, "sliding_window": None,
        "transformers_version": "4.43.0.dev0", "vocab_size": 32768,
    },
    "HuggingFaceH4/zephyr-7b-beta": _MISTRAL | {
        "_name_or_path": "mistralai/Mistral-7B-v0.1", "pad_token_id": 2, "rope_theta": 10000.0,
        "sliding_window": 4096, "transformers_version": "4.35.0", "vocab_size": 32000,
    },
    "a fine-tuned Mistral with a Llama's keys": _MISTRAL | {
        "attention_bias": False, "attention_dropout": 0.0, "layer_types": None, "mlp_bias": False,
        "pretraining_tp": 1, "quantization_config": None, "rope_scaling": None, "rope_theta": 1000000.0,
        "sliding_window": None, "transformers_version": "4.51.3", "unsloth_fixed": True, "vocab_size": 32768,
    },
    "Qwen/Qwen2-0.5B": _QWEN2 | {
        "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 131072, "max_window_layers": 24,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "sliding_window": 131072,
        "tie_word_embeddings": True, "transformers_version": "4.40.1", "vocab_size": 151936,
    },
    "Qwen/Qwen2.5-3B": _QWEN2 | {
        "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 32768, "max_window_layers": 36,
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2, "sliding_window": 32768,
        "tie_word_embeddings": True, "transformers_version": "4.40.1", "use_mrope": False, "vocab_size": 151936,
    },
    "Qwen/Qwen2.5-72B": _QWEN2 | {
        "hidden_size": 8192, "intermediate_size": 29568, "max_position_embeddings": 131072, "max_window_layers": 80,
        "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "sliding_window": None, "tie_word_embeddings": False, "transformers_version": "4.40.1", "use_mrope": False,
        "vocab_size": 152064,
    },
    "Qwen/Qwen2.5-7B-Instruct with its long texts switched on": _QWEN2 | {
        "eos_token_id": 151645, "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768,
        "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "sliding_window": 131072, "tie_word_embeddings": False, "transformers_version": "4.43.1",
        "vocab_size": 152064,
    },
    "Qwen/Qwen3-32B": _QWEN2 | {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "eos_token_id": 151645, "head_dim": 128,
        "hidden_size": 5120, "intermediate_size": 25600, "max_position_embeddings": 40960, "max_window_layers": 64,
        "model_type": "qwen3", "num_attention_heads": 64, "num_hidden_layers": 64, "num_key_value_heads": 8,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
        "transformers_version": "4.51.0", "vocab_size": 151936,
    },
    "tiiuae/falcon-7b": _FALCON | {
        "architectures": ["FalconForCausalLM"], "hidden_size": 4544, "model_type": "falcon", "multi_query": True,
        "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"}, "new_decoder_architecture": False,
        "num_attention_heads": 71, "num_hidden_layers": 32, "num_kv_heads": 71, "transformers_version": "4.27.4",
    },
    "tiiuae/falcon-180B": _FALCON | {
        "architectures": ["FalconForCausalLM"], "hidden_size": 14848, "model_type": "falcon", "multi_query": True,
        "new_decoder_architecture": True, "num_attention_heads": 232, "num_hidden_layers": 80, "num_kv_heads": 8,
        "transformers_version": "4.32.0",
    },
    "tiiuae/falcon-11B": _FALCON | {
        "activation": "gelu", "architectures": ["FalconForCausalLM"], "ff_factor": 4, "ffn_hidden_size": 16384,
        "hidden_size": 4096, "max_position_embeddings": 8192, "model_type": "falcon", "multi_query": True,
        "new_decoder_architecture": True, "num_attention_heads": 32, "num_hidden_layers": 60, "num_kv_heads": 8,
        "num_ln_in_parallel_attn": 1, "rope_scaling": None, "rope_theta": 500042.0, "tie_word_embeddings": False,
        "transformers_version": "4.39.2",
    },
}  # fmt: skip

# The first files of Falcon, and of a much used conversion of Llama, which name classes that transformers never had.
FIRST: dict[str, dict[str, Any]] = {
    "falcon_7b": _FALCON | {
        "architectures": ["RWForCausalLM"], "auto_map": _REMOTE, "hidden_size": 4544,
        "model_type": "RefinedWebModel", "multi_query": True, "n_head": 71, "n_layer": 32,
        "transformers_version": "4.27.4",
    },
    "falcon_40b": _FALCON | {
        "architectures": ["RWForCausalLM"], "auto_map": _REMOTE, "hidden_size": 8192, "model_type": "RefinedWeb",
        "n_head": 128, "n_head_kv": 8, "n_layer": 60, "transformers_version": "4.27.4",
    },
    "llama_7b": _7B | {
        "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
        "initializer_range": 0.02, "max_sequence_length": 2048, "model_type": "llama", "pad_token_id": -1,
        "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": True,
        "vocab_size": 32000,
    },
}  # fmt: skip

# What is refused, and the words that say why.
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "stabilityai/stablelm-2-1_6b": ({"architectures": ["StableLmForCausalLM"]}, "architecture 'StableLmForCausalLM'"),
    "microsoft/Phi-3-mini-4k-instruct": ({"architectures": ["Phi3ForCausalLM"]}, "architecture 'Phi3ForCausalLM'"),
    "mistralai/Mixtral-8x7B-v0.1": ({"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM'"),
    "internlm/internlm2-7b": ({"architectures": ["InternLM2ForCausalLM"]}, "'InternLM2ForCausalLM'"),
    "a reward model": (_LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification'"),
    "a headless model": (_LLAMA | {"architectures": ["LlamaModel"]}, "architecture 'LlamaModel'"),
    "tiiuae/falcon-rw-1b": (
        _FALCON | {"alibi": True, "architectures": ["FalconForCausalLM"], "bias": True, "hidden_size": 2048},
        "alibi is True",
    ),
    "its first file": (FIRST["falcon_7b"] | {"alibi": True, "parallel_attn": False}, "alibi is True"),
    "Qwen/Qwen2.5-7B-Instruct-1M": (
        CONFIGS["Qwen/Qwen2.5-72B"] | {"dual_chunk_attention_config": {"chunk_size": 262144}},
        "would lose: dual_chunk_attention_config",
    ),
    "TheBloke/Llama-2-7B-GPTQ": (
        CONFIGS["lmsys/vicuna-7b-v1.5"] | {"quantization_config": {"bits": 4, "quant_method": "gptq"}},
        "would lose: quantization_config",
    ),
    "a Granite's keys in a Llama": (
        CONFIGS["lmsys/vicuna-7b-v1.5"] | {"residual_multiplier": 0.22, "logits_scaling": 8.0},
        "would lose: logits_scaling, residual_multiplier",
    ),
    "biases that no Mistral has": (CONFIGS["mistralai/Mistral-7B-v0.1"] | {"attention_bias": True}, "attention_bias"),
    "the wrong model_type": (_LLAMA | _7B | {"model_type": "mistral"}, "model_type 'mistral' contradicts the archit"),
}  # fmt: skip
