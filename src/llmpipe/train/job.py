"""What one training is given: the file RUN/job.json that the launcher writes and every rank reads."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from llmpipe.checkpoint import manifest
from llmpipe.config import check_held_out, parse_split
from llmpipe.data.dataset import manifest as dataset_manifest
from llmpipe.errors import UserError
from llmpipe.files import read_json, write_json
from llmpipe.layout import Layout
from llmpipe.recipe import Recipe
from llmpipe.yaml_file import build

# Keys of a recipe that a run may go on under other values of. `steps` does change the steps to come: the rate's course,
# and, beyond one epoch, the order of the data. So does what is to be skipped, and no checkpoint that took a step of
# skip_steps is gone on from (train/state.py). Other kernels round differently at most, as another layout does.
CONTINUABLE = (
    "steps", "save_every", "save_minutes", "keep", "milestones", "skip_steps", "spike", "roll_back_after",
    "check_replicas_every", "eval_every", "eval_batches", "recompute", "recompute_every", "compile", "apex",
    "deterministic",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What model and datasets were when the launcher began, by their hashes."""

    model: str = ""
    """As `Job.model_digest` says it; empty: nobody has looked yet."""
    data: dict[str, str] = field(default_factory=dict)
    """Of each dataset, by prefix."""
    written: dict[str, list[int]] = field(default_factory=dict, compare=False)
    """When the files of each were written, which clocks and copies may tell otherwise on another node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training: which model on which data by which recipe, in which layout, into which run folder."""

    recipe: Recipe
    layout: Layout
    """Resolved."""
    model: str
    """A directory of rank files or a checkpoint."""
    data: dict[str, float]
    """Dataset prefix: weight in the blend."""
    split: list[float]
    """Shares of train, validation, test; all for train where one of the next two is given."""
    validation: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    """Datasets of their own, which no step trains on."""
    output: str
    """The run folder."""
    exit_at_step: int = 0
    """The ranks save and leave after this step; 0: after the last one."""
    timeout_minutes: float = 10.0
    """How long a rank waits for another one that does not answer."""
    all_ranks: bool = False
    """Each rank writes what its steps took, in RUN/ranks."""
    profile_steps: list[int] = field(default_factory=list)
    """The first and the last step, counted from 1, of the traces in RUN/profile."""
    config_files: list[str] = field(default_factory=list)
    """The files that this was read from, for the record."""
    origin: dict[str, str] = field(default_factory=dict)
    """Where it comes from, for the record: see train/origin.py."""
    inputs: Inputs = field(default_factory=Inputs)
    """Told by the launcher, so that neither a rank nor who reads job.json hashes whole datasets again."""

    def __post_init__(self) -> None:
        check_held_out(self.data, self.validation, self.test)

    @property
    def run(self) -> Path:
        return Path(self.output)

    @property
    def datasets(self) -> list[str]:
        """The prefix of each, trained on or held out."""
        return [*self.data, *self.validation, *self.test]

    @property
    def held_out(self) -> tuple[dict[Path, float], list[float]]:
        """The datasets whose validation part is evaluated on, and their split: the job's own ones for it, or all."""
        data = self.validation or self.data
        split = [0.0, 1.0, 0.0] if self.validation else self.split
        return {Path(prefix): weight for prefix, weight in data.items()}, split

    @property
    def live(self) -> Path:
        """The metrics so far, which become metrics.jsonl at the end."""
        return self.run / "live.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Where this training's checkpoints stand: other inputs have a folder of their own (design decision 14)."""
        return self.run / "checkpoints" / self.digest()[:16]

    def with_inputs(self) -> "Job":
        """The job, told what its model and data are; one that was told before stays as it is."""
        if self.inputs.model:
            return self
        written = {prefix: dataset_manifest.written(Path(prefix)) for prefix in self.datasets}
        return replace(self, inputs=Inputs(model=self.model_digest(), data=self.data_digests(), written=written))

    def model_digest(self) -> str:
        """The model's identity: for rank files that of the checkpoint they were cut from, whatever the layout."""
        return self.inputs.model or _model_digest(Path(self.model))

    def check_model(self) -> None:
        """UserError for a model that is another one than when the launcher began: its link, say, leads elsewhere."""
        found = _model_digest(Path(self.model))
        if found != self.model_digest():
            raise UserError(
                f"{self.model} is of checkpoint {found} now, and this training began with {self.inputs.model}:"
                " put that back, or run finetune again, which then trains the new one from its start"
            )

    def data_digests(self) -> dict[str, str]:
        """The identity of each dataset, by prefix."""
        if self.inputs.data:
            return self.inputs.data
        return {prefix: dataset_manifest.digest(Path(prefix)) for prefix in self.datasets}

    def check_data(self) -> None:
        """UserError for a dataset that is another one than when the launcher began; hashed only where written since."""
        for prefix, began_with in self.inputs.data.items():
            path = Path(prefix)
            if dataset_manifest.written(path) == self.inputs.written.get(prefix):
                continue
            dataset_manifest.check(path)
            if dataset_manifest.digest(path) != began_with:
                raise UserError(
                    f"{prefix} is another dataset now than the one that this training began with: put that back, or run"
                    " finetune again, with what is there now"
                )

    def digest(self) -> str:
        """The hash of model, data and recipe, without steps, layout, logging and evaluation keys."""
        recipe = {key: value for key, value in asdict(self.recipe).items() if key not in CONTINUABLE}
        digests = self.data_digests()
        data = [[digests[prefix], weight] for prefix, weight in self.data.items()]
        content = json.dumps([self.model_digest(), data, self.split, recipe], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def is_finished(self) -> bool:
        """Whether the run folder holds, whole, what this training makes: the same inputs, the same number of steps."""
        record, weights = self.run / "run.json", self.run / "weights"
        if not all(path.is_file() for path in (record, weights / manifest.NAME, self.run / "metrics.jsonl")):
            return False
        told = read_json(record, "remove it, and run finetune again")
        skipped = told.get("recipe", {}).get("skip_steps", [])
        made = told.get("job_digest"), told.get("steps"), skipped, told.get("weights_digest")
        return made == (self.digest(), self.recipe.steps, self.recipe.skip_steps, manifest.read(weights).digest)

    @property
    def path(self) -> Path:
        """RUN/job.json."""
        return self.run / "job.json"

    def write(self) -> None:
        """Write RUN/job.json."""
        write_json(self.path, asdict(self))


def _model_digest(model: Path) -> str:
    made = manifest.read(model)
    return made.source.get("checkpoint", made.digest)


def parse_steps(text: str | None) -> list[int]:
    """`--profile-steps 10-12`, or 10 alone, as the first and the last step; UserError for something else."""
    if text is None:
        return []
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and 1 <= int(first) <= int(last or first)):
        raise UserError(f"--profile-steps {text}: steps counted from 1 are expected, as 10-12 or 10")
    return [int(first), int(last or first)]


def job_split(given: str | None, held_out: bool) -> list[float]:
    """The split that `--split` says, 969,30,1 without it; all for train beside datasets that are held out."""
    if not held_out:
        return parse_split(given or "969,30,1")
    if given is not None:
        raise UserError(
            f"--split {given} takes documents of --data away from training, but --validation or --test are given too:"
            " give one or the other"
        )
    return [1.0, 0.0, 0.0]


def read_job(path: Path) -> Job:
    """The job that a launcher wrote."""
    return build(Job, json.loads(path.read_text()), "")
