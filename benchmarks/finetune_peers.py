"""One training in a process of its own, which waits for its turns: llmpipe's engine, or what stands beside it.

    python benchmarks/finetune_peers.py WORKER SETTINGS.json

finetune_speed.py and gpu_finetune.py start it. All have the same weights, batches (tokens, and the token after each as
its label), learning rate, decay, clipping and AdamW, the fused one, where they let choose. A worker writes a line of
JSON before each turn, and goes on when it is sent a line. Workers:

engine       llmpipe.train's loop as `llmpipe finetune` runs it: groups, FSDP2, metrics, stop file
own_loop     ten lines over llmpipe's decoder
hf_loop      ten lines over transformers' model
hf_trainer   transformers.Trainer
litgpt       litgpt.pretrain.fit, of an environment that has litgpt instead of llmpipe
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

BETAS, EPS = (0.9, 0.95), 1e-8
DTYPES = {"fp32": torch.float32, "mixed": torch.float32, "bf16": torch.bfloat16}


class Turns:
    """Called where a step begins: at a turn's first one it tells what the turn before took, and waits."""

    def __init__(self, settings: SimpleNamespace):
        self.settings, self.calls, self.inside, self.losses = settings, 0, 0.0, []
        self.held: dict[str, int] = {}
        self.told = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever the others print

    def __call__(self) -> None:
        if self.calls % self.settings.turn == 0:
            self._synchronize()
            if self.calls:
                wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
                self._tell(wall=wall, cpu=cpu, inside=self.inside)
            if self.calls == self.settings.turn * self.settings.turns:
                self._tell(losses=self.losses, memory=most_memory(self.settings.device), states=self.held)
                os._exit(0)
            sys.stdin.readline()
            self.wall, self.cpu, self.inside = time.perf_counter(), time.process_time(), 0.0
        self.calls += 1

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose CPU time counts as forward, backward or optimizer."""

        def call(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            found = function(*arguments, **named)
            self.inside += time.process_time() - start
            return found

        return call

    def _tell(self, **values: Any) -> None:
        print(json.dumps(values), file=self.told, flush=True)

    def _synchronize(self) -> None:
        if self.settings.device == "cuda":
            torch.cuda.synchronize()


def most_memory(device: str) -> int:
    """This process's peak in bytes: of the GPU's allocator, or resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def engine(settings: SimpleNamespace, turns: Turns) -> None:
    """The turns begin where the loop asks for a step's batch."""
    import torch.distributed as dist
    from finetune_inputs import job_of

    from llmpipe.data.batches.loader import Loader
    from llmpipe.layout import Layout
    from llmpipe.parallel.pipeline import Pipeline
    from llmpipe.parallel.processes import BACKENDS
    from llmpipe.train import loop
    from llmpipe.train.optimizer import Optimizer

    run = Path(tempfile.mkdtemp(dir=settings.work))
    job = job_of(settings, run, Layout(device=settings.device, micro_batch=settings.micro_batch).resolved())
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group(BACKENDS[settings.device], init_method=f"file://{run}/rendezvous", rank=0, world_size=1)
    next_batch, step = Loader.step, Optimizer.step

    def asked(loader: Loader, number: int) -> Any:
        lines = (run / "live.jsonl").read_text().splitlines() if turns.calls % settings.turn == 0 else []
        turns.losses = [json.loads(line)["loss"] for line in lines] or turns.losses
        turns()
        return next_batch(loader, number)

    def stepped(optimizer: Optimizer, *rates: float) -> None:
        step(optimizer, *rates)
        turns.held = turns.held or held(optimizer.model, optimizer.adamw)

    Loader.step = asked
    Pipeline.forward_backward = turns.timed(Pipeline.forward_backward)
    Optimizer.reduce_and_clip, Optimizer.step = turns.timed(Optimizer.reduce_and_clip), turns.timed(stepped)
    loop.train(job)


def states(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """What is held between steps, in which precision: its bytes."""
    found: dict[str, int] = {}
    for name, tensor in tensors:
        name = f"{name} {str(tensor.dtype).removeprefix('torch.')}"
        found[name] = found.get(name, 0) + tensor.numel() * tensor.element_size()
    return found


def held(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The states of a model and its AdamW, which may step other parameters than the model's own."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [optimizer.state[p][name] for p in stepped for name in ("exp_avg", "exp_avg_sq")]
    found = [("parameters", p) for p in model.parameters()]
    found += [("master weights", p) for p in stepped if p.data_ptr() not in own]
    return states([*found, *(("AdamW's moments", moment) for moment in moments)])


def batches(settings: SimpleNamespace) -> Iterator[torch.Tensor]:
    """(micro_batch, T + 1) of each micro-batch of each step, in order."""
    rows = np.load(Path(settings.work) / "batches.npy", mmap_mode="r")
    for start in range(0, len(rows), settings.micro_batch):
        yield torch.from_numpy(np.array(rows[start : start + settings.micro_batch], np.int64))


def adamw(settings: SimpleNamespace, model: torch.nn.Module) -> torch.optim.AdamW:
    """Norms are not decayed."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=BETAS, eps=EPS, fused=True)


def minimal(
    settings: SimpleNamespace,
    turns: Turns,
    model: torch.nn.Module,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """The loop that anybody writes. loss_of: the mean loss of tokens and labels, (B, T) each."""
    optimizer, source = adamw(settings, model), batches(settings)
    parts = settings.global_batch // settings.micro_batch
    while True:
        turns()
        loss = 0.0
        for rows in (next(source).to(settings.device) for _ in range(parts)):
            with torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "mixed"):
                share = loss_of(rows[:, :-1], rows[:, 1:]) / parts
            share.backward()
            loss += share.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        turns.losses.append(float(loss))


def own_loop(settings: SimpleNamespace, turns: Turns) -> None:
    from llmpipe.layout import Stages
    from llmpipe.model.load import load_decoder
    from llmpipe.parallel.groups import TensorParallel

    if settings.precision == "mixed":
        raise SystemExit("own_loop has no mixed precision: FSDP2 brings it to the engine")
    place = Path(settings.work) / "model", TensorParallel(), Stages(), 0
    (model,) = load_decoder(*place, DTYPES[settings.precision], torch.device(settings.device))
    model.train().requires_grad_(True)
    cu_seqlens = torch.arange(settings.micro_batch + 1, dtype=torch.int32, device=settings.device) * settings.seq_len
    weights = torch.full([settings.micro_batch * settings.seq_len], 1 / (settings.micro_batch * settings.seq_len))
    weights = weights.to(settings.device)
    minimal(settings, turns, model, lambda x, y: model(x.flatten(), cu_seqlens, y.flatten(), weights)[0])


def transformers_model(settings: SimpleNamespace) -> Any:
    from transformers import AutoModelForCausalLM

    path, dtype = Path(settings.work) / "model", DTYPES[settings.precision]
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").train()


def hf_loop(settings: SimpleNamespace, turns: Turns) -> None:
    model = transformers_model(settings).to(settings.device)

    def loss_of(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(tokens, use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    minimal(settings, turns, model, loss_of)


def hf_trainer(settings: SimpleNamespace, turns: Turns) -> None:
    """Its own defaults but for what all share, and what makes it faster."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Callback(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns()

        def on_step_end(self, *_: Any, **given: Any) -> None:
            turns.held = turns.held or held(given["model"], given["optimizer"])

        def on_log(self, _: Any, __: Any, ___: Any, logs: Any = None, **____: Any) -> None:
            turns.losses += [logs["loss"]] if "loss" in logs else []

    rows = [row for group in batches(settings) for row in group]

    def collate(picked: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        stacked = torch.stack(picked)
        tokens, labels = stacked[:, :-1].contiguous(), stacked[:, 1:].contiguous()
        return {"input_ids": tokens, "labels": labels, "shift_labels": labels}

    given = TrainingArguments(
        tempfile.mkdtemp(dir=settings.work), max_steps=settings.turn * settings.turns + 1,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.global_batch // settings.micro_batch,
        learning_rate=settings.lr, lr_scheduler_type="constant", weight_decay=settings.weight_decay,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS, max_grad_norm=settings.clip,
        optim="adamw_torch_fused", bf16=settings.precision == "mixed", use_cpu=settings.device == "cpu",
        gradient_checkpointing=settings.recompute != "off",
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.recompute != "off" else None,
        torch_compile=settings.compile,
        tf32=False if settings.device == "cuda" else None,  # which compiling would switch on
        train_sampling_strategy="sequential", remove_unused_columns=False,
        use_liger_kernel=settings.device == "cuda" and find_spec("liger_kernel") is not None,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model = transformers_model(settings)
    Trainer(model, given, collate, rows, callbacks=[Callback()]).train()  # type: ignore[arg-type]


def litgpt(settings: SimpleNamespace, turns: Turns) -> None:
    """Its pretraining's loop, which clips; weights renamed by its own converter."""
    import lightning
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.pretrain import fit

    parts = settings.global_batch // settings.micro_batch
    precision = {"fp32": "32-true", "mixed": "bf16-mixed", "bf16": "bf16-true"}[settings.precision]
    fabric = lightning.Fabric(accelerator=settings.device, devices=1, precision=precision)
    model = fabric.setup(litgpt_model(settings))
    optimizer = fabric.setup_optimizers(adamw(settings, model))

    class Batches:
        def __iter__(self) -> Iterator[torch.Tensor]:
            for number, rows in enumerate(batches(settings)):
                if number % parts == 0:
                    turns()
                yield rows

    fabric.log_dict = lambda metrics, step: turns.losses.append(metrics["loss"])  # type: ignore[method-assign]
    training = TrainArgs(
        save_interval=None, global_batch_size=settings.global_batch, micro_batch_size=settings.micro_batch,
        lr_warmup_steps=0, max_tokens=1 << 40, max_norm=settings.clip, min_lr=settings.lr,
    )  # fmt: skip
    state = {"model": model, "optimizer": optimizer, "iter_num": 0, "step_count": 0}
    one = [next(batches(settings))]  # it validates before it begins
    fit(fabric, 1, state, Batches(), one, Path(settings.work), None, training, EvalArgs(max_iters=1))  # type: ignore


def litgpt_model(settings: SimpleNamespace) -> Any:
    from litgpt import Config
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from safetensors.torch import load_file

    folder = Path(settings.work) / "model"
    told = json.loads((folder / "config.json").read_text())
    config = Config(
        block_size=settings.seq_len, vocab_size=told["vocab_size"], padded_vocab_size=told["vocab_size"],
        n_layer=told["num_hidden_layers"], n_head=told["num_attention_heads"], n_embd=told["hidden_size"],
        n_query_groups=told["num_key_value_heads"], head_size=told["head_dim"], rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=told["rms_norm_eps"],
        mlp_class_name="LLaMAMLP", intermediate_size=told["intermediate_size"],
    )  # fmt: skip
    weights: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    renamed: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, renamed, weights)
    model = GPT(config)
    model.load_state_dict(renamed)
    return model.to(DTYPES[settings.precision])


if __name__ == "__main__":
    given = SimpleNamespace(**json.loads(Path(sys.argv[2]).read_text()))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    globals()[sys.argv[1]](given, Turns(given))
