"""SHA-256: hashlib is the judge, whatever the pieces and whichever thread takes them."""

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest

from llmpipe import hashing, helpers
from llmpipe.hashing import FileHashes, new_hash, update_two

# Around a block's 64 bytes and the 56 after which the length needs a block of its own.
SIZES = (0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 127, 128, 129, 1000, 70_001)


@pytest.fixture(params=["compiled", "hashlib"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "hashlib":
        monkeypatch.delattr(helpers, "Sha256", raising=False)
    elif not hasattr(helpers, "Sha256"):
        pytest.skip("this processor has no SHA instructions: hashlib is used")


def test_streams_in_pieces(kind: None) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        ours, judges = (new_hash(), new_hash()), (hashlib.sha256(), hashlib.sha256())
        for _ in range(rng.integers(5)):
            pieces = [rng.integers(0, 256, int(rng.choice(SIZES)), np.uint8) for _ in ours]
            update_two(ours[0], pieces[0], ours[1], pieces[1])
            for judge, piece in zip(judges, pieces, strict=True):
                judge.update(piece)
            ours[1].update(pieces[0])
            judges[1].update(pieces[0])
        assert [one.hexdigest() for one in ours] == [judge.hexdigest() for judge in judges]
        assert ours[0].hexdigest() == judges[0].hexdigest()  # asking ends nothing


def test_a_stream_is_not_its_own_partner() -> None:
    if not hasattr(helpers, "Sha256"):
        pytest.skip("this processor has no SHA instructions: hashlib is used")
    one = helpers.Sha256()
    with pytest.raises(ValueError, match="two streams are needed"):
        helpers.Sha256.update_two(one, np.zeros(64, np.uint8), one, np.zeros(64, np.uint8))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, str]:
    """Files of many sizes, and hashlib's answers."""
    monkeypatch.setattr(hashing, "_PIECE_BYTES", 4096)
    rng = np.random.default_rng(1)
    found = {}
    for number, size in enumerate((0, 1, 4095, 4096, 4097, 100_000, 64, 300_001)):
        content = rng.bytes(size)
        path = tmp_path / str(number)
        path.write_bytes(content)
        found[path] = hashlib.sha256(content).hexdigest()
    return found


def test_files(kind: None, files: dict[Path, str]) -> None:
    assert FileHashes(files).results() == files
    assert FileHashes().results() == {}


def test_files_beside_what_threads_write(kind: None, files: dict[Path, str]) -> None:
    hashes, rng = FileHashes(files), np.random.default_rng(2)
    written = [rng.integers(0, 256, 90_000, np.uint8) for _ in range(4)]
    digests = [new_hash() for _ in written]

    def write(number: int) -> None:
        for start in range(0, 90_000, 10_000):
            hashes.beside(digests[number], written[number][start : start + 10_000])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hashes.results() == files
    assert [digest.hexdigest() for digest in digests] == [hashlib.sha256(data).hexdigest() for data in written]


def test_one_more_file(kind: None, files: dict[Path, str]) -> None:
    (path, digest), *others = reversed(files.items())
    hashes = FileHashes(dict(others))
    assert hashes.of(path) == digest
    assert hashes.results() == dict(others)


def test_a_file_that_was_hashed_elsewhere_is_not_read(files: dict[Path, str]) -> None:
    hashes, (path, digest) = FileHashes(files), list(files.items())[-1]
    path.unlink()
    hashes.found(path, digest)
    hashes.found(path.with_name("no file of these"), digest)
    assert hashes.results() == files


def test_a_file_that_is_gone(files: dict[Path, str]) -> None:
    next(iter(files)).unlink()
    with FileHashes(files) as hashes, pytest.raises(FileNotFoundError):
        hashes.results()
