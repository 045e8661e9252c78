"""What each rank tells of itself when asked: RUN/ranks/rank-N.jsonl, seconds by phase; RUN/profile/, kernel by kernel.

{"step": 1, "data_seconds": 0.01, "forward_backward_seconds": 0.2, "reduce_seconds": 0.02,
 "optimizer_seconds": 0.01, "evaluate_seconds": 0.0, "save_seconds": 0.0, "memory_bytes": 1234}
"""

import json
import logging
import time

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from llmpipe.files import write_text
from llmpipe.train.job import Job
from llmpipe.train.line_file import LineFile
from llmpipe.train.metrics import memory_bytes

log = logging.getLogger(__name__)

PHASES = ("data", "forward_backward", "reduce", "optimizer", "evaluate", "save")


class Observer:
    """Follows one rank through its steps, counted from 1; unless asked for, it does nothing and costs nothing."""

    def __init__(self, job: Job, device: torch.device):
        rank = dist.get_rank()
        self.device = device
        self.path = job.run / f"ranks/rank-{rank}.jsonl" if job.all_ranks else None
        self.lines: LineFile | None = None
        self.first, self.last = job.profile_steps or (0, 0)
        self.trace = job.run / f"profile/rank-{rank}.json"
        self.profiler: profile | None = None
        self.seconds: dict[str, float] = {}
        self.since = 0.0

    def resume(self, step: int) -> None:
        """The steps up to this one are done: what stands of later ones is of an attempt that was cut off."""
        if 0 < self.first <= step and not self.trace.exists():
            log.warning("steps %s to %s are not traced: training goes on after step %s", self.first, self.last, step)
        if self.path:
            self.path.parent.mkdir(exist_ok=True)
            kept = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
            write_text(self.path, "".join(line for line in kept if _step_of(line) <= step))
            self.lines = LineFile(self.path)

    def begin(self, step: int) -> None:
        """A step begins."""
        if step == self.first:
            gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self.profiler = profile(activities=[ProfilerActivity.CPU, *gpu], acc_events=True)
            self.profiler.start()
        self.seconds.update(dict.fromkeys(PHASES, 0.0))
        self.since = self._now()

    def lap(self, phase: str) -> None:
        """A phase of the step has ended."""
        now = self._now()
        self.seconds[phase] += now - self.since
        self.since = now

    def end(self, step: int) -> None:
        """A step has ended."""
        if self.lines:
            seconds = {f"{phase}_seconds": round(value, 6) for phase, value in self.seconds.items()}
            self.lines.add({"step": step, **seconds, "memory_bytes": memory_bytes(self.device)})
        if step == self.last:
            self.close()

    def close(self) -> None:
        """Write the trace, if one is being taken; training may have ended before its last step."""
        if self.profiler:
            self.profiler.stop()
            try:
                self.trace.parent.mkdir(exist_ok=True)
                self.profiler.export_chrome_trace(str(self.trace))
            except OSError as error:
                log.warning("%s is not written: %s", self.trace, error)
            self.profiler = None

    def _now(self) -> float:
        """Kernels run on after the call that starts them: to time them is to wait for them."""
        if self.lines and self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _step_of(line: str) -> float:
    """A line's step; of one that was cut off, infinity."""
    return json.loads(line)["step"] if line.endswith("}\n") else float("inf")
