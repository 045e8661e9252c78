"""The own models of both Megatron-LLaMAs on one of their files, unsharded, on the CPU; run by their recipes.

    python benchmarks/proof/megatron_llama_forward.py {ali|mfz} CHECKOUT SHAPE FILE PADDED_VOCAB LOGITS.json

`apex`, `amp_C` and `fused_layer_norm_cuda` are empty modules, as for the converters. Of the model: RMSNorm's CUDA
kernel is its formula (alibaba's; MinfanZhao's is plain torch already), the device of the buffer for attention scores is
the CPU, the fork of CUDA's random numbers does nothing, and the ffn size is set after the arguments are parsed
(MinfanZhao's computes its own). Attention is the model's, masked and unfused. theta is 10000, a constant in both.
"""

import contextlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import torch
from tiny import SHAPES, config

STUBS = {
    "amp_C.py": "",
    "fused_layer_norm_cuda.py": "",
    "apex/__init__.py": "",
    "apex/multi_tensor_apply.py": "multi_tensor_applier = None\n",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": "FusedLayerNormAffineFunction = FusedRMSNormAffineFunction = None\n",
}
TOKENS = [(7 * i + 3) % 131 for i in range(24)]
LISTED = (0, 11, 12, 23)
FLAGS = {
    "ali": "--RMSNorm --causal-lm --layernorm-epsilon {eps}",
    "mfz": "--use-rmsnorm --rmsnorm-epsilon {eps} --rope-style llama --untie-embeddings-and-output-weights",
}
COMMON = (
    "--num-layers {0} --hidden-size {1} --num-attention-heads {2} --seq-length 24 --max-position-embeddings 256"
    " --no-position-embedding --use-rotary-position-embeddings --swiglu --disable-bias-linear --micro-batch-size 1"
    " --global-batch-size 1 --lr 1e-4 --train-iters 1 --use-cpu-initialization --no-masked-softmax-fusion"
    " --no-bias-gelu-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion --hidden-dropout 0"
    " --attention-dropout 0 --no-async-tensor-model-parallel-allreduce --tokenizer-type NullTokenizer --vocab-size 131"
)


class RMSNorm:
    """In the place of apex's FusedRMSNormAffineFunction."""

    @staticmethod
    def apply(x: torch.Tensor, weight: torch.Tensor, shape: object, eps: float) -> torch.Tensor:
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps) * weight


def stub(directory: Path) -> None:
    """The modules that `import megatron` asks for."""
    for name, text in STUBS.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def run(fork: str, checkout: Path, stubs: Path, shape: str, file: Path, padded_vocab: int) -> dict[str, object]:
    """The logits of its model in a process of its own, or the last line of its errors."""
    target = stubs / "logits.json"
    arguments = [fork, checkout, shape, file, padded_vocab, target]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(stubs)},
        capture_output=True,
        text=True,
    )
    return {"error": done.stderr.strip().splitlines()[-1]} if done.returncode else json.loads(target.read_text())


def stand_in() -> None:
    """What only a GPU has."""
    import apex.normalization.fused_layer_norm as norms

    norms.FusedRMSNormAffineFunction = RMSNorm
    torch.cuda.current_device = lambda: "cpu"
    import megatron.core.tensor_parallel

    megatron.core.tensor_parallel.get_cuda_rng_tracker = lambda: Namespace(fork=contextlib.nullcontext)


def start(fork: str, shape: str, padded_vocab: int) -> None:
    """Its arguments, and one process."""
    from megatron import global_vars
    from megatron.arguments import parse_args, validate_args
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType

    flags = FLAGS[fork].format(eps=config(shape)["rms_norm_eps"])
    sys.argv = ["pretrain_llama.py", *COMMON.format(*SHAPES[shape]).split(), *flags.split()]
    args = parse_args()
    validate_args(args, {})
    args.model_type, args.rank = ModelType.encoder_or_decoder, 0
    args.ffn_hidden_size, args.padded_vocab_size = SHAPES[shape][5], padded_vocab
    global_vars.set_args(args)
    global_vars._GLOBAL_NUM_MICROBATCHES_CALCULATOR = Namespace(get=lambda: 1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)


def main(fork: str, checkout: str, shape: str, file: str, padded_vocab: str, target: str) -> None:
    sys.path.insert(0, checkout)
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    stand_in()
    start(fork, shape, int(padded_vocab))
    from megatron.model import LLaMAModel

    model = LLaMAModel(parallel_output=False).eval()
    model.load_state_dict(torch.load(file, weights_only=False)["model"], strict=True)
    tokens = torch.tensor(TOKENS)[None]
    future = torch.ones(1, 1, len(TOKENS), len(TOKENS)).triu(1).bool()
    with torch.no_grad():
        logits = model(tokens, torch.arange(len(TOKENS))[None], future)
    listed = [[float(f"{x:.9g}") for x in logits[0, at, :131].tolist()] for at in LISTED]
    found = {"rope_theta": 1e4, "norm_eps": config(shape)["rms_norm_eps"], "tokens": TOKENS}
    Path(target).write_text(json.dumps(found | {"listed": LISTED, "logits": listed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
