"""The page: what a run's files say is there, what they do not say is told, and nothing is asked of anybody."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from report_project import STEPS, evaluate, export, make_chats, make_full_run, make_run

from llmpipe.cli import group
from llmpipe.errors import UserError
from llmpipe.families import named_size
from llmpipe.report.commands import stages
from llmpipe.report.curves import QUANTITIES, charts
from llmpipe.report.figures import duration, figures, num_parameters
from llmpipe.report.gather import read_run, read_runs
from llmpipe.report.lineage import lineage
from llmpipe.report.page import page
from llmpipe.report.provenance import commands


class Page(HTMLParser):
    """Its text by section, the addresses that it names, and whether its tags are closed in order."""

    VOID = ("meta", "link", "br")

    def __init__(self, html: str):
        super().__init__()
        self.sections: dict[str, str] = {"head": ""}
        self.section, self.addresses, self.open = "head", list[str](), list[str]()
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [values[name] or "" for name in ("src", "href", "srcset", "data") if name in values]
        if tag == "section":
            self.section = values["id"] or ""
            self.sections[self.section] = ""
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open)
        if tag == "section":
            self.section = "head"

    def handle_data(self, data: str) -> None:
        self.sections[self.section] += data + " "


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_whole_run(project: Path) -> None:
    run = make_run(project, "a")
    evaluate(run)
    export(run)
    shown = Page(page(read_runs([run])))
    assert [*shown.sections] == [
        "head", "key-figures", "settings", "curves", "evaluation", "verification", "data", "lineage", "commands",
    ]  # fmt: skip
    assert "m (1.99k parameters) was trained for 20 steps (640 tokens) on c, on 2 CPU processes (tp 2)" in " ".join(
        shown.sections["head"].split()
    )
    assert "fell from 10 to 8" in shown.sections["head"] and "exported" in shown.sections["head"]
    assert "1 min 15 s" in shown.sections["key-figures"] and "1.5 GiB" in shown.sections["key-figures"]
    assert "its loss is no number" in shown.sections["key-figures"]
    assert "<piqa>" in shown.sections["evaluation"] and "0.2500 ± 0.0100" in shown.sections["evaluation"]
    assert "-0.25 (-50.0 %)  worse" in shown.sections["evaluation"] and "better" in shown.sections["evaluation"]
    assert "logits of tp2-pp1" in shown.sections["verification"] and "not run" in shown.sections["verification"]
    assert "consolidated.00.pth" in shown.sections["lineage"] and "made again" not in shown.sections["lineage"]
    assert shown.sections["lineage"].count("hashes agree") == 5


def test_it_asks_nobody_for_anything(project: Path) -> None:
    html = page(read_runs([make_run(project, "a"), make_run(project, "b", lr=0.1)]))
    addresses = Page(html).addresses
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert "url(" not in html and "@import" not in html and "http" not in html.replace("http://www.w3.org/2000/svg", "")


def test_what_is_not_there_is_said(project: Path) -> None:
    shown = Page(page(read_runs([make_run(project, "a")])))
    assert "Not evaluated and not exported yet" in shown.sections["head"]
    assert "a has not been evaluated." in shown.sections["evaluation"]
    assert "eval_every" in shown.sections["curves"]
    assert "No logs of the stages were found" in shown.sections["commands"]
    assert "Held-out" not in shown.sections["key-figures"] and "MFU" not in shown.sections["key-figures"]


def test_no_empty_charts(project: Path) -> None:
    run = make_run(project, "a")
    drawn = " ".join(charts(read_runs([run])))
    for title in ("Loss", "Learning rate", "Gradient norm", "Throughput", "Memory"):
        assert f"<h3>{title} " in drawn
    assert "Accuracy" not in drawn and "MFU" not in drawn and "Loss scale" not in drawn and "held out" not in drawn
    (run / "metrics.jsonl").write_text("")
    assert charts(read_runs([run])) == []
    assert "a has no steps to draw yet." in page(read_runs([run]))


def test_all_that_a_run_can_have(project: Path) -> None:
    run = make_full_run(project, "a")
    drawn = charts(read_runs([run]))
    assert len(drawn) == len(QUANTITIES)
    dashed = [" ".join(re.findall(r'<i class="(c\d) dashed"', each)) for each in drawn]
    assert dashed == ["c1", "c1", *[""] * 6]  # what is held out, in the same colour wherever it is drawn
    shown = Page(page(read_runs([run])))
    for name in ("Held-out loss", "resumed from a checkpoint once", "43.", "53 GiB", "its gradients overflow fp16"):
        assert name in shown.sections["key-figures"]
    assert "eval_every" not in shown.sections["curves"]
    assert shown.sections["data"].count("documents by length") == 2
    assert shown.sections["commands"].count(" GiB") == 9


def test_a_run_that_is_training(project: Path) -> None:
    run = make_run(project, "a", finished=False)
    shown = Page(page(read_runs([run])))
    assert f"{STEPS} of {STEPS} steps so far" in shown.sections["key-figures"]
    assert "is being trained, or was interrupted" in shown.sections["head"]
    assert "100.0%" in shown.sections["data"] or "%" in shown.sections["data"]


def test_two_runs_side_by_side(project: Path) -> None:
    a, b = make_run(project, "a"), make_run(project, "b", lr=0.5)
    evaluate(a, after=8.0)
    evaluate(b, after=6.0)
    shown = Page(page(read_runs([a, b])))
    settings = shown.sections["settings"].split()
    assert settings[settings.index("recipe.lr") + 1 :][:2] == ["0.001", "0.5"] and "recipe.seq_len" not in settings
    assert (
        "b less a" in " ".join(shown.sections["evaluation"].split())
        and "-2 (-25.0 %)  better" in shown.sections["evaluation"]
    )
    assert shown.sections["verification"].count("logits of tp2-pp1") == 1  # they started from the same weights
    drawn = " ".join(charts(read_runs([a, b])))
    assert 'class="curve c0"' in drawn and 'class="curve c1"' in drawn and ">step<" in drawn
    same = Page(page(read_runs([a, make_run(project, "c")])))
    assert "Model, data, recipe, layout and split are the same." in same.sections["settings"]


def test_runs_with_other_batches_are_drawn_over_tokens(project: Path) -> None:
    a, b = make_run(project, "a"), make_run(project, "b")
    lines = [json.loads(line) for line in (b / "metrics.jsonl").read_text().splitlines()]
    (b / "metrics.jsonl").write_text("".join(json.dumps(line | {"tokens": 99 * line["step"]}) + "\n" for line in lines))
    assert "tokens seen" in " ".join(charts(read_runs([a, b])))


def test_namesakes_are_told_apart(project: Path) -> None:
    first, second = make_run(project / "x", "a"), make_run(project / "y", "a")
    assert [run.name for run in read_runs([first, second])] == [str(first), str(second)]


def test_a_broken_link_of_the_lineage_is_seen(project: Path) -> None:
    run = make_run(project, "a")
    make_chats(project / "results/models/m/corpora/c", [[1, 2, 2]] * 3)
    (dataset,) = read_run(run, "a").datasets
    assert dataset.statistics is None and "made again" in dataset.missing
    held = {step.kind: step.holds for _, steps in lineage(read_run(run, "a")) for step in steps}
    assert held["dataset"] is False and held["rank files"] and held["checkpoint"] and held["trained weights"]


def test_moved_inputs_are_said_to_have_moved(project: Path) -> None:
    run = make_run(project, "a")
    (project / "results/models").rename(project / "elsewhere")
    shown = Page(page(read_runs([run])))
    assert "its files are not where the run read them" in shown.sections["data"]
    assert "no longer there" in shown.sections["lineage"]
    assert "No verification card" in shown.sections["verification"]


def test_a_run_is_found_from_any_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(project, "a")
    monkeypatch.chdir("/")
    assert [one.statistics is not None for one in read_run(run, "a").datasets] == [True]
    assert len(read_run(run, "a").cards) == 2


def test_commands_and_times_from_logs(project: Path) -> None:
    run = make_run(project, "a")
    (project / "logs/finetune").mkdir(parents=True)
    command = "llmpipe finetune 'my recipe.yaml' --output results/runs/a"
    (project / "logs/finetune/a.log").write_text(f"2026-01-01 00:00:00 INFO $ {command}\nmore\n")
    (project / "logs/finetune/a.benchmark.tsv").write_text("s\th:m:s\tmax_rss\n12.5\t0:00:12\t2048.0\n")
    (project / "logs/finetune/b.log").write_text("INFO $ llmpipe finetune another\n")
    (project / "logs/evaluate").mkdir()
    (project / "logs/evaluate/a.log").write_text("no command\n")
    (stage,) = stages(read_run(run, "a"))
    assert (stage.name, stage.command, stage.seconds) == ("finetune", command, 12.5)
    assert stage.peak_mb == pytest.approx(2 * 2**30 / 1e6)
    assert "<td>2 GiB</td>" in commands([read_run(run, "a")])


def test_names_from_files_are_text_not_tags(project: Path) -> None:
    run = make_run(project, "<script>alert(1)<")
    assert "<script>alert" not in page(read_runs([run]))


def test_the_same_files_give_the_same_page(project: Path) -> None:
    run = make_run(project, "a")
    assert page(read_runs([run])) == page(read_runs([run]))


def test_what_is_no_run_is_refused(project: Path) -> None:
    make_run(project, "a")
    with pytest.raises(UserError) as raised:
        read_runs([Path("results/runs")])
    assert str(raised.value) == (
        "results/runs is no run's folder: it has neither run.json nor job.json, which finetune writes; in it there are"
        " results/runs/a; name a folder of results/runs"
    )


def test_a_record_of_another_kind_is_refused(project: Path) -> None:
    Path("run.json").write_text('{"weights_digest": "d"}')
    with pytest.raises(UserError, match=r"run.json says nothing of model, data, recipe, layout, split: another"):
        read_runs([Path()])


def test_the_command(project: Path) -> None:
    run = make_run(project, "a")
    done = CliRunner().invoke(group, ["report", str(run), "--output", "out/page.html"])
    assert done.exit_code == 0, done.output
    assert (project / "out/page.html").read_text().startswith("<!doctype html>")


def test_parameters_are_those_that_transformers_counts() -> None:
    from dataclasses import asdict

    assert num_parameters(asdict(named_size("llama2_7b"))) == 6_738_415_616
    assert num_parameters({"family": "llama"}) is None and num_parameters(None) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (59.9, "59.9 s"), (75, "1 min 15 s"), (3600, "1 h 0 min"), (90_061, "1 d 1 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_skipped_steps_leave_the_mean_alone(project: Path) -> None:
    found = {figure.name: figure.value for figure in figures(read_run(make_run(project, "a"), "a"))}
    assert found["Training loss"] == f"{sum(4 / step for step in range(11, 21)) / 10:.3f}"
    assert found["Skipped steps"] == "1"
