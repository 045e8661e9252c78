"""What EasyLM's own converters and trainer write, tensor by tensor: docs/proof/easylm.json.

Original: github.com/young-geng/EasyLM @ fe5b2c3 (2024-08-12), its commands run as they are, nothing stubbed, on the
CPU. It needs Python 3.11 and, in an environment of its own (EasyLM's own pins but for torch, of which any will do):

    pip install "jax[cpu]==0.4.28" flax==0.8.3 optax==0.2.2 transformers==4.41.0 "numpy<2" "scipy<1.14" mlxu==0.2.0 \
        einops sentencepiece "datasets<3" "pyarrow<18" "pandas<2.3" "huggingface-hub<0.27" wandb==0.18.7 \
        "protobuf<6" gcsfs==2024.6.1 "googleapis-common-protos<1.70" "setuptools<70" torch safetensors
    python benchmarks/proof/easylm.py EASYLM_CHECKOUT WORK_FOLDER --tokenizer demo/weights/tiny_llama/tokenizer.model

Read back by msgpack and flax themselves. What is run:

    hf_to_easylm   EasyLM.models.llama.convert_hf_to_easylm, --streaming and --nostreaming
    easylm_to_hf   EasyLM.models.llama.convert_easylm_to_hf (it writes fp16, whatever it reads)
    train          EasyLM.models.llama.llama_train for no steps: loads params::, saves streaming_train_state and
                   metadata.pkl; the tokenizer only lets it start
    logits         EasyLM's own forward on the tiny checkpoints
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import record
import tiny
import torch
from safetensors.torch import load_file

COMMIT = "fe5b2c3"
SHAPES = ("mha_4", "gqa_8_2", "gqa_6_3", "gqa_12_4")
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def said(shape: str, theta: float = 23000.0) -> dict[str, object]:
    """A shape in EasyLM's words."""
    num_layers, hidden, num_heads, num_kv_heads, _, ffn, vocab = tiny.SHAPES[shape]
    return {
        "base_model": "debug",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": 3e-5,
        "max_position_embeddings": 256,
        "rope_theta": theta,
    }


def flags(shape: str) -> list[str]:
    return [f"--llama.{name}={value}" for name, value in said(shape).items()]


def run(module: str, *arguments: str) -> None:
    """One of EasyLM's own commands."""
    environment = os.environ | {"WANDB_MODE": "disabled", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-m", f"EasyLM.models.llama.{module}", *arguments], check=True, env=environment)


def described(arrays: dict[str, np.ndarray]) -> dict[str, dict]:
    """Shape, type and digest of each array, by its keys joined with "/"."""
    return {
        name: {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": sha256(array.tobytes())}
        for name, array in arrays.items()
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stream(path: Path) -> dict[str, np.ndarray]:
    """A streaming file, as msgpack and flax read it."""
    import msgpack
    from flax.serialization import from_bytes

    with path.open("rb") as file:
        return {"/".join(key): np.asarray(from_bytes(None, value)) for key, value in msgpack.Unpacker(file)}


def nested(path: Path) -> dict[str, np.ndarray]:
    """A file of flax's own, as flax reads it."""
    from flax.serialization import msgpack_restore
    from flax.traverse_util import flatten_dict

    return flatten_dict(msgpack_restore(path.read_bytes()), sep="/")


def case(shape: str, dtype: str, direction: str, files: dict[str, dict], **more: object) -> dict:
    return {"shape": shape, "dtype": dtype, "tp": 1, "pp": 1, "direction": direction, **more, "files": files}


def to_easylm(work: Path, shape: str, dtype: str, streaming: bool) -> dict:
    """hf_to_easylm; the source is stored in fp32."""
    output = work / (f"{shape}.{dtype}.stream" if streaming else f"{shape}.flax")
    source = work / f"{shape}.hf"
    tiny.write(shape, source)
    run(
        "convert_hf_to_easylm", f"--hf_model={source}", f"--output_file={output}", f"--streaming={streaming}",
        f"--float_dtype={TYPES[dtype]}", *flags(shape),
    )  # fmt: skip
    found = {output.name: described((stream if streaming else nested)(output))}
    whole = {output.name: sha256(output.read_bytes())}
    return case(shape, dtype, "hf_to_easylm", found, streaming=streaming, whole_file=whole)


def to_hf(work: Path, shape: str, dtype: str, prefix: str) -> dict:
    """easylm_to_hf of what to_easylm wrote."""
    name = f"{shape}.{dtype}.stream" if prefix == "params" else f"{shape}.flax"
    run(
        "convert_easylm_to_hf",
        f"--load_checkpoint={prefix}::{work / name}",
        f"--output_dir={work / 'back'}",
        *flags(shape),
    )
    tensors = load_file(work / "back" / "model.safetensors")
    files = {"model.safetensors": {name: record.describe(tensor) for name, tensor in sorted(tensors.items())}}
    config = json.loads((work / "back" / "config.json").read_text())
    shutil.rmtree(work / "back")
    return case(shape, dtype, "easylm_to_hf", files, prefix=prefix, config=config)


def train(work: Path, shape: str, dtype: str, tokenizer: Path) -> dict:
    """A train state, with the optimizer's, as the trainer saves it before its first step."""
    (work / "tokenizer").mkdir(exist_ok=True)
    shutil.copy(tokenizer, work / "tokenizer" / "tokenizer.model")
    (work / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (work / "text.jsonl").write_text('{"text": "one line of text"}\n' * 16)
    shutil.rmtree(work / "run", ignore_errors=True)
    run(
        "llama_train", "--mesh_dim=1,1,1", "--total_steps=0", "--save_model_freq=1", "--train_dataset.type=json",
        f"--load_checkpoint=params::{work / f'{shape}.float32.stream'}", f"--tokenizer={work / 'tokenizer'}",
        f"--train_dataset.json_dataset.path={work / 'text.jsonl'}", "--train_dataset.text_processor.fields=text",
        "--train_dataset.json_dataset.seq_length=32", "--train_dataset.json_dataset.batch_size=1",
        "--optimizer.type=adamw", "--checkpointer.save_optimizer_state=True", "--logger.online=False",
        f"--checkpointer.float_dtype={TYPES[dtype]}", f"--logger.output_dir={work / 'run'}", *flags(shape),
    )  # fmt: skip
    (file,) = (work / "run").rglob("streaming_train_state")
    tensors = described(stream(file))
    others = [name for name in tensors if not name.startswith("params/")]
    kept = {name: facts for name, facts in tensors.items() if name.startswith("params/") or facts["shape"] == []}
    return case(shape, dtype, "train", {file.name: kept}, not_weights=len(others), metadata=metadata(file.parent))


def metadata(folder: Path) -> dict:
    """What metadata.pkl says of the model."""
    import pickle

    found = pickle.loads((folder / "metadata.pkl").read_bytes())
    kept = {name: found["llama_config"][name] for name in (*said("mha_4"), "tie_word_embeddings")}
    return {"keys": sorted(found), "step": found["step"], "llama_config": kept}


def logits(work: Path, shape: str, theta: float) -> list[list[float]]:
    """EasyLM's own forward in fp32: the logits at the first and the last of 24 positions."""
    import jax
    import jax.numpy as jnp
    from EasyLM.checkpoint import StreamingCheckpointer
    from EasyLM.models.llama.llama_model import FlaxLLaMAForCausalLMModule, LLaMAConfigurator
    from ml_collections import ConfigDict

    model = FlaxLLaMAForCausalLMModule(LLaMAConfigurator.finalize_config(ConfigDict(said(shape, theta))))
    _, params = StreamingCheckpointer.load_trainstate_checkpoint(f"params::{work / f'{shape}.float32.stream'}")
    tokens = jnp.asarray([[(7 * i + 3) % 131 for i in range(24)]])
    with jax.default_matmul_precision("float32"):
        found = model.apply(params, tokens, deterministic=True).logits[0]
    return [[float(f"{value:.8g}") for value in found[position].tolist()] for position in (0, -1)]


def forward(work: Path, shape: str) -> dict:
    """The logits, and whether rope_theta changes them."""
    told, default = logits(work, shape, 23000.0), logits(work, shape, 1e4)
    more = {"tokens": "(7 * i + 3) % 131 for i in range(24)", "positions": [0, 23], "logits": default}
    return case(shape, "float32", "logits", {}, rope_theta_is_heard=told != default, rope_theta=1e4, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help=f"EasyLM's repository at {COMMIT}")
    parser.add_argument("work", type=Path, help="a folder for the files")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="any SentencePiece tokenizer.model of Llama's kind"
    )
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(arguments.checkout.resolve()))
    os.environ["PYTHONPATH"] = str(arguments.checkout.resolve())
    torch.set_num_threads(1)
    cases = [to_easylm(work, shape, "float32", True) for shape in SHAPES]
    cases += [to_easylm(work, "gqa_6_3", dtype, True) for dtype in ("bfloat16", "float16")]
    cases += [to_easylm(work, "gqa_8_2", "float32", False)]
    cases += [to_hf(work, "gqa_6_3", "bfloat16", "params"), to_hf(work, "gqa_8_2", "float32", "flax_params")]
    cases += [train(work, "gqa_6_3", "float32", arguments.tokenizer.resolve())]
    cases += [forward(work, shape) for shape in ("mha_4", "gqa_6_3")]
    proof = {"system": "EasyLM", "commit": COMMIT, "cases": cases}
    target = Path(__file__).parents[2] / "docs" / "proof" / "easylm.json"
    record.write(target, proof)


if __name__ == "__main__":
    main()
