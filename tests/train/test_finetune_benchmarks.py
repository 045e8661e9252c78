"""The benchmarks of fine-tuning on a tiny model, so that they run where there is a GPU to measure."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

TINY = ["--shape", "tiny", "--seq", "32", "--document", "500", "--global-batch", "2", "--turn", "1", "--turns", "1"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    module.main()


def test_the_gpu_benchmark_runs_on_the_cpu(benchmark, monkeypatch, capsys, tmp_path) -> None:
    rest = ["--device", "cpu", "--recompute", "full", "--no-compile"]
    run(benchmark("gpu_finetune"), monkeypatch, str(tmp_path), *TINY, *rest)
    told = capsys.readouterr().out
    ours, trainer = (line.split("|")[1:-1] for line in told.splitlines()[-2:])
    assert ours[0].strip() == "engine" and trainer[0].strip() == "hf_trainer"
    assert "the CPU, torch" in told and "no numbers of a GPU" in told
    for row in (ours, trainer):
        assert float(row[2].replace(",", "")) > 0
        assert row[6].split(",")[0].startswith(" parameters bfloat16")
        assert row[6].split(",")[1].startswith(" AdamW's moments bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_that_there_is_no_gpu(benchmark, monkeypatch, tmp_path) -> None:
    with pytest.raises(SystemExit, match="torch sees no GPU here: run this where there is one, or --shape tiny"):
        run(benchmark("gpu_finetune"), monkeypatch, str(tmp_path), "--shape", "llama2_7b")
    assert not list(tmp_path.iterdir())


def test_the_cpu_benchmark_compares_the_same_arithmetic(benchmark, tmp_path) -> None:
    """The engine's losses in its turns are those of a plain loop over transformers' model."""
    inputs, speed, shape = benchmark("finetune_inputs"), benchmark("finetune_speed"), benchmark("gpu_finetune").TINY
    settings = inputs.Settings(str(tmp_path), seq_len=32, micro_batch=2, global_batch=4, turn=2, turns=2, lr=1e-2)
    speed.prepare(tmp_path, shape, settings)
    engine, reference = speed.paired(settings, dict.fromkeys(("engine", "hf_loop"), sys.executable), threads=1)
    assert len(engine.turns) == len(reference.turns) == 2
    assert 0 < engine.median("inside") < engine.median("cpu")
    losses = engine.end["losses"]
    assert len(losses) == 4 and losses[-1] < 0.97 * losses[0]
    assert losses == pytest.approx(reference.end["losses"], rel=1e-5)
    cpu, memory = speed.cost(settings, {"dp": 2})
    assert cpu > 0 and memory > 1e8
