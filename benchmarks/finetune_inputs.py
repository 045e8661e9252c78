"""What the fine-tuning benchmarks train: a random model, a dataset, and how, as a file that each worker reads."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from llmpipe.checkpoint import manifest
from llmpipe.data.batches.sampling import Blend
from llmpipe.data.dataset.indexed import Writer, token_dtype
from llmpipe.families import FAMILIES, Shape, layer_of, to_hf_config
from llmpipe.layout import Layout
from llmpipe.recipe import Recipe, Schedule
from llmpipe.train.job import Job

SEED = 1234
SPLIT = [1.0, 0.0, 0.0]
STD = 0.02
TINY = Shape(
    family="llama", num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn=96, vocab=199,
    max_positions=4096, norm_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip


@dataclass
class Settings:
    """One training, of whichever worker."""

    work: str
    """The folder with model, data and batches.npy, (samples, seq_len + 1) int64: the same for all workers."""
    seq_len: int
    micro_batch: int
    global_batch: int
    turn: int
    """Steps at a time."""
    turns: int
    precision: str = "fp32"
    """fp32; mixed: fp32 weights, gradients and optimizer, bf16 products; bf16: all in bf16."""
    device: str = "cpu"
    recompute: str = "off"
    recompute_every: int = 1
    compile: bool = False
    isolate: bool = False
    """Packed documents do not see each other; only llmpipe's engine does it."""
    lr: float = 1e-4
    weight_decay: float = 0.1
    clip: float = 1.0

    @property
    def steps(self) -> int:
        return self.turn * self.turns

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_len

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path


def make_model(folder: Path, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> None:
    """A Hugging Face directory with random weights, a file for each layer; as it stands if it is there already."""
    if (folder / manifest.NAME).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hf_config(shape, str(dtype).removeprefix("torch."), None, None)))
    family, files, index = FAMILIES[shape.family], {}, {}
    for key in family.keys(shape):
        layer = layer_of(key)
        files.setdefault(f"model-{'rest' if layer is None else f'{layer:03}'}.safetensors", []).append(key)
    generator = torch.Generator(device).manual_seed(SEED)
    for file, keys in files.items():
        tensors = {family.hf_name(key, shape): _tensor(shape, key, dtype, generator) for key in keys}
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    manifest.write(folder, "checkpoint", {})


def _tensor(shape: Shape, key: str, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    size = FAMILIES[shape.family].row(key, shape).shape(shape)
    if len(size) == 1:
        return torch.ones(size, dtype=dtype)
    drawn = torch.randn(size, generator=generator, device=generator.device)
    return (drawn * STD).to(dtype).cpu()


def make_data(prefix: Path, vocab: int, num_tokens: int, document: int) -> None:
    """Documents of `document` tokens, each of which follows from the one before, with noise, so that losses fall."""
    if prefix.with_suffix(".idx").exists():
        return
    rng = np.random.default_rng(SEED)
    count = num_tokens // document + 1
    with Writer(prefix, token_dtype(vocab)) as writer:
        for _ in range(count):
            writer.add(np.cumsum(rng.integers(1, 4, document)) * 7 % vocab, np.array([document]))


def make_batches(settings: Settings) -> None:
    """WORK/batches.npy: the samples in the order in which llmpipe's engine takes them, and a step more."""
    count = (settings.steps + 1) * settings.global_batch
    blend = Blend({Path(settings.work) / "data": 1.0}, SPLIT, "train", settings.seq_len, count, SEED)
    rows: list[Any] = blend.read(np.arange(count))
    np.save(Path(settings.work) / "batches.npy", np.stack([tokens for tokens, _ in rows]))


def recipe_of(settings: Any) -> Recipe:
    """llmpipe's recipe of a training, with a step beyond the last turn."""
    kept = "bf16" if settings.precision == "bf16" else "fp32"
    return Recipe(
        seq_len=settings.seq_len, global_batch=settings.global_batch, steps=settings.turn * settings.turns + 1,
        lr=settings.lr, schedule=Schedule(kind="constant"),
        precision="fp32" if settings.precision == "fp32" else "bf16",
        parameters=kept, gradients=kept, weight_decay=settings.weight_decay,
        clip=settings.clip, seed=SEED, isolate_documents=settings.isolate, recompute=settings.recompute,
        recompute_every=settings.recompute_every, compile=settings.compile, save_every=1 << 30,
    )  # fmt: skip


def job_of(settings: Any, run: Path, layout: Layout) -> Job:
    """llmpipe's job of a training, into the folder `run`."""
    work = Path(settings.work)
    data = {str(work / "data"): 1.0}
    return Job(
        recipe=recipe_of(settings), layout=layout, model=str(work / "model"), data=data, split=SPLIT, output=str(run)
    )
