"""llmpipe tokenize: its bytes against sentencepiece and numpy, its manifest, its errors, and what a death leaves."""

import gzip
import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from click.testing import CliRunner
from data_help import train

from llmpipe.cli.tokenize import command
from llmpipe.data import tokenize as data_tokenize
from llmpipe.data.dataset.indexed import Reader
from llmpipe.data.tokenize import corpus_of
from llmpipe.data.workers import Workers
from llmpipe.errors import UserError

TEXTS = ["Beautiful is better than ugly.", "", "<s> caf\u00e9 </s>", "def f(x):\n    return x\n", " \U0001f600"]


def corpus(path: Path, texts: list[str] = TEXTS, key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def run(*arguments: object) -> str:
    """Run the command here; its errors are raised."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stderr


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as error:
        run(*arguments)
    return str(error.value)


@pytest.mark.parametrize(("options", "bos", "eod"), [((), [], [2]), (("--bos", "--no-append-eod"), [1], [])])
def test_tokens_are_sentencepieces(tmp_path: Path, tokenizer_dir: Path, options: tuple, bos: list, eod: list) -> None:
    run(corpus(tmp_path / "c.jsonl"), "--tokenizer", tokenizer_dir, "--output", tmp_path / "out", *options)
    truth = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))
    expected = [bos + truth.EncodeAsIds(text) + eod for text in TEXTS if text]
    assert (tmp_path / "out.bin").read_bytes() == np.concatenate(expected).astype("<u2").tobytes()
    assert np.fromfile(tmp_path / "out.idx", "<i4", len(expected), offset=34).tolist() == list(map(len, expected))


def test_manifest(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = corpus(tmp_path / "c.jsonl", key="body")
    arguments = ("--tokenizer", tokenizer_dir, "--output", tmp_path / "out", "--text-key", "body", "--bos")
    log = run(source, *arguments)
    facts = json.loads((tmp_path / "out.manifest.json").read_text())
    sizes = np.fromfile(tmp_path / "out.idx", "<i4", 4, offset=34)

    def hashed(path: Path) -> dict:
        return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}

    model = tokenizer_dir / "tokenizer.model"
    assert facts["tokenizer"] == {
        "path": str(model), "kind": "sentencepiece", "sha256": hashed(model)["sha256"],
        "files": {"tokenizer.model": hashed(model)["sha256"]}, "vocab_size": 400, "bos_id": 1, "eos_id": 2,
    }  # fmt: skip
    assert (facts["kind"], facts["bos"], facts["append_eod"], facts["text_key"]) == ("dataset", True, True, "body")
    assert (facts["documents"], facts["empty_documents"], facts["tokens"]) == (4, 1, int(sizes.sum()))
    assert facts["sources"] == [{"path": str(source), **hashed(source)}]
    assert facts["files"] == {name: hashed(tmp_path / name) for name in ("out.bin", "out.idx")}
    assert "1 documents have no text and are left out" in log


def test_bytes_are_the_same_for_any_workers_and_batches(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = corpus(tmp_path / "c.jsonl", [f"{text} {i}" for i in range(200) for text in TEXTS])
    digests = set()
    for workers, block_bytes in ((1, 1 << 20), (3, 1 << 20), (3, 100), (2, 1)):
        monkeypatch.setattr("llmpipe.data.readers.lines.BLOCK_BYTES", block_bytes)
        run(source, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out", "--workers", workers)
        files = [tmp_path / f"out{suffix}" for suffix in (".bin", ".idx", ".manifest.json")]
        digests.add(tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in files))
    assert len(digests) == 1


def test_a_line_over_many_blocks(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmpipe.data.readers.lines.BLOCK_BYTES", 50)
    texts = ["one", "two words " * 100, "three"]
    for name in ("c.jsonl", "c.jsonl.gz"):
        data = corpus(tmp_path / "c.jsonl", texts).read_bytes()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        run(tmp_path / name, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out")
        truth = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))
        reader = Reader(tmp_path / "out")
        assert [truth.Decode(reader.read(i).tolist()[:-1]) for i in range(3)] == texts


def test_several_inputs_in_order(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "2.txt").write_text("two")
    corpus(tmp_path / "d" / "1.jsonl", ["one"])
    corpus(tmp_path / "0.jsonl", ["zero"])
    run(tmp_path / "d", tmp_path / "0.jsonl", "--tokenizer", tokenizer_dir, "--output", tmp_path / "out")
    truth = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))
    reader = Reader(tmp_path / "out")
    assert [truth.Decode(reader.read(i).tolist()) for i in range(3)] == ["one", "two", "zero"]


def test_a_corpus_file_and_options_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    corpus(tmp_path / "c.jsonl")
    (tmp_path / "c.yaml").write_text("files: [c.jsonl]\ntext_key: body\nbos: true\nappend_eod: false\n")
    found = corpus_of([Path("c.yaml")], text_key=None, bos=None, append_eod=True)
    assert (found.files, found.text_key, found.bos, found.append_eod) == (["c.jsonl"], "body", True, True)
    with pytest.raises(UserError, match="a corpus YAML stands alone"):
        corpus_of([Path("c.yaml"), Path("c.jsonl")])
    (tmp_path / "d.yaml").write_text("files: [data/none.jsonl]\n")
    with pytest.raises(UserError) as error:
        corpus_of([Path("d.yaml")])
    assert str(error.value) == (
        "d.yaml, files: data/none.jsonl is missing: name a file or a directory of .jsonl, .json, .txt (also with .gz"
        " or .zst), .parquet and .arrow files (paths count from the folder you are in)"
    )


@pytest.mark.parametrize("texts", [[], ["", ""]], ids=["no line", "no text"])
def test_an_empty_corpus_is_refused(tmp_path: Path, tokenizer_dir: Path, texts: list[str]) -> None:
    source = corpus(tmp_path / "c.jsonl", texts)
    message = refused(source, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out")
    assert message == f"the corpus is empty: no document with text in {source}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl"]


def test_a_bad_line_leaves_nothing(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = corpus(tmp_path / "c.jsonl", TEXTS * 100)
    with source.open("a") as file:
        file.write("oops\n")
    message = refused(source, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out" / "c")
    assert message == f"{source}, line 501 is not JSON (Expecting value: character 1): 'oops'"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_mark_that_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    model = train(tmp_path / "tokenizer.model", 390, bos_id=-1, eos_id=-1)
    source = corpus(tmp_path / "c.jsonl")
    message = refused(source, "--tokenizer", model, "--output", tmp_path / "out")
    assert message == f"{model} has no EOS token to mark documents with: say --no-append-eod"
    message = refused(source, "--tokenizer", model, "--output", tmp_path / "out", "--bos")
    assert message == f"{model} has no BOS token to mark documents with: say --no-bos"


def test_kill_9_leaves_nothing_finished(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Killed when the first of many batches is on disk."""
    source, out = tmp_path / "c.jsonl", tmp_path / "out"
    line = json.dumps({"text": "Beautiful is better than ugly. " * 1000}) + "\n"
    source.write_text(line * (40_000_000 // len(line)))
    arguments = ["tokenize", str(source), "--tokenizer", str(tokenizer_dir), "--output", str(out / "c")]
    process = subprocess.Popen([sys.executable, "-m", "llmpipe", *arguments], stderr=subprocess.DEVNULL)
    while not any(path.stat().st_size for path in out.glob(".c.bin.*.part")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(out.glob("[!.]*")) == []

    corpus(source)
    run(source, "--tokenizer", tokenizer_dir, "--output", out / "c")
    assert Reader(out / "c").num_documents == 4


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, tokenizer_dir: Path) -> None:
    """15 MB more text, which is 30 batches more, take less than half of that more memory."""

    def peak(megabytes: int) -> int:
        lines = json.dumps({"text": "Beautiful is better than ugly. " * 300}) + "\n"
        (tmp_path / "c.jsonl").write_text(lines * (megabytes * 10**6 // len(lines)))
        code = (
            "import resource; from pathlib import Path; from llmpipe.data import tokenize as t;"
            " from llmpipe.data.readers import lines; lines.BLOCK_BYTES = 500000;"
            f" t.tokenize(t.corpus_of([Path({str(tmp_path / 'c.jsonl')!r})]), Path({str(tokenizer_dir)!r}),"
            f" Path({str(tmp_path / 'out')!r}), 1); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)

    assert peak(18) - peak(3) < 7_500  # kB


def test_tokenizing_imports_no_heavy_package() -> None:
    code = "import sys, llmpipe.data.tokenize; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"[]\n"


@pytest.mark.parametrize(
    ("name", "options", "threads"),
    [
        ("c.jsonl", [], True),
        ("c.jsonl", ["--text-key", "a.b"], False),
        ("c.jsonl", ["--encoder", "reference"], False),
        ("c.txt", [], False),
    ],
)
def test_workers_are_threads_where_all_is_compiled(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: list[str], threads: bool
) -> None:
    asked: list[bool] = []

    class Told(Workers[Any]):
        def __init__(self, function: Any, count: int, threads: bool):
            asked.append(threads)
            super().__init__(function, count, threads)

    monkeypatch.setattr(data_tokenize, "Workers", Told)
    (tmp_path / name).write_text('{"text": "a", "a": {"b": "c"}}\n')
    run(tmp_path / name, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out", *options)
    assert asked == [threads]
