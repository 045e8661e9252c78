"""Every kind of damage in every format: a clear error or the right weights, and nothing left behind."""

import dataclasses
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import damaged
import pytest
import torch
from damaged import FORMATS, MEGATRON, VOCAB, Damage, edit, swap, to_matrix, weights
from safetensors.torch import load_file, save_file

from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.convert import Target, convert, merge, shard
from llmpipe.checkpoint.formats import NOTHING, Told, open_source
from llmpipe.errors import UserError
from llmpipe.layout import Stages

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
TORCH = ("bin", "meta", *MEGATRON)
SPLIT = ("meta", "mcore", "legacy", "ali", "mfz", "ranks")  # by rows and columns: files of one shape
FILES = ("indexed", "bin", "epf", *SPLIT)  # several files
NO_CHECKSUMS = ("hf", "indexed", "easylm")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    damaged.build(root)
    return root


class Run:
    """A copy of a format's files to damage, and the conversion of it."""

    def __init__(self, models: Path, folder: Path):
        self.models, self.folder = models, folder
        self.source, self.output = folder / "source", folder / "output"

    def damage(self, name: str, *damages: Damage, manifested: bool = False) -> "Run":
        self.told = Told(vocab=VOCAB) if name in (*MEGATRON, "torch_dist") else NOTHING
        shutil.copytree(self.models / name, self.source)
        if manifested:
            (self.source / "manifest.json").unlink(missing_ok=True)
            manifest.write(self.source, "download", {"path": "hf://org/tiny"})
        for damage in damages:
            damage(self.source)
        return self

    def refused(self, *parts: str, **options: bool) -> None:
        """One UserError that says these things; no output, and nothing beside it."""
        with pytest.raises(UserError) as error:
            convert(self.source, self.output, told=self.told, **options)
        missing = [part for part in parts if not re.search(part, str(error.value))]
        assert not missing, f"{missing} not in {error.value}"
        assert str(self.source) in str(error.value)
        assert [path.name for path in self.folder.iterdir()] == ["source"]

    def right(self) -> None:
        """The weights are the undamaged model's."""
        convert(self.source, self.output, told=self.told)
        same_weights(self.output, self.models / "hf")


def same_weights(one: Path, other: Path) -> None:
    first, second = open_source(one), open_source(other)
    assert dataclasses.replace(first.shape, max_positions=second.shape.max_positions) == second.shape  # Meta's: unsaid
    for key in first.keys():  # noqa: SIM118
        assert torch.equal(first.read(key), second.read(key)), key


@pytest.fixture
def run(models: Path, tmp_path: Path) -> Run:
    return Run(models, tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_right_undamaged(run: Run, name: str) -> None:
    run.damage(name).right()


def truncate(share: float) -> Damage:
    return lambda path: os.truncate(weights(path)[-1], int(weights(path)[-1].stat().st_size * share))


def replace(data: bytes) -> Damage:
    return lambda path: weights(path)[0].write_bytes(data)


TO_FILES = {
    "cut in half": truncate(0.5),
    "cut at the end": truncate(0.99999),
    "empty": replace(b""),
    "a page of errors": replace(b"<html>404</html>"),
    "a pointer of git-lfs": replace(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n"),
    "zeros": lambda path: weights(path)[0].write_bytes(bytes(weights(path)[0].stat().st_size)),
    "missing": lambda path: weights(path)[-1].unlink(),
    "a dead link": lambda path: [(file.unlink(), file.symlink_to("/none")) for file in weights(path)[:1]],
}


@pytest.mark.parametrize("damage", TO_FILES)
@pytest.mark.parametrize("name", FORMATS)
def test_whole_files(run: Run, name: str, damage: str) -> None:
    run.damage(name, TO_FILES[damage]).refused()


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_there_twice(run: Run, name: str) -> None:
    run.damage(name, lambda path: shutil.copy(weights(path)[0], weights(path)[1])).refused()


@pytest.mark.parametrize("name", ["indexed", "bin", "meta", "mcore", "legacy", "epf", "ali", "ranks"])
def test_two_files_swapped(run: Run, name: str) -> None:
    """Not MinfanZhao's: its files say nothing of their rank."""
    run.damage(name, lambda path: swap(*weights(path)[:2])).refused()


def test_rank_files_swapped_or_of_two_checkpoints(run: Run, models: Path, tmp_path: Path) -> None:
    run.damage("ranks", lambda path: (path / "manifest.json").unlink())
    ranks = [run.source / f"tp{tp}-pp0.safetensors" for tp in (0, 1)]
    swap(*ranks)
    run.refused(r"tp0-pp0\.safetensors is the file of rank tp1-pp0 under another's name")
    swap(*ranks)
    other = shutil.copytree(models / "hf", tmp_path / "other")
    save_file({n: t + 1 for n, t in damaged.tensors().items()}, other / "model.safetensors", {"format": "pt"})
    convert(other, tmp_path / "checkpoint")
    shard(tmp_path / "checkpoint", tmp_path / "ranks", 2, Stages(2))
    shutil.copy(tmp_path / "ranks/tp1-pp1.safetensors", run.source)
    with pytest.raises(UserError, match=r"tp1-pp1\.safetensors is of the checkpoint [0-9a-f]{64}, but tp0-pp0"):
        merge(run.source, run.output)


TO_TENSORS = {
    "left out": (to_matrix(lambda _: None), ""),
    "transposed": (to_matrix(lambda tensor: tensor.T.contiguous()), "wrong shape|fit each other|evenly|do not fit"),
    "a dimension more": (to_matrix(lambda tensor: tensor[None].clone()), ""),
    "no elements": (to_matrix(lambda tensor: tensor[:0].clone()), ""),
    "whole numbers": (to_matrix(lambda tensor: tensor.to(torch.int8)), "int8"),
    "NaN": (to_matrix(lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("nan"))), "NaN or infinite values"),
    "infinite": (to_matrix(lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("-inf"))), "--allow-nonfinite"),
}


@pytest.mark.parametrize("damage", TO_TENSORS)
@pytest.mark.parametrize("name", ["hf", "indexed", *TORCH, "ranks"])
def test_tensors(run: Run, name: str, damage: str) -> None:
    change, message = TO_TENSORS[damage]
    run.damage(name, change, lambda path: (path / "manifest.json").unlink(missing_ok=True)).refused(message)


@pytest.mark.parametrize("name", ["bin", *MEGATRON, "meta"])
def test_8_bit_floats_are_no_weights_here(run: Run, name: str) -> None:
    run.damage(name, to_matrix(lambda tensor: tensor.to(torch.float8_e4m3fn))).refused("float8_e4m3fn")


@pytest.mark.parametrize("name", SPLIT)
def test_files_of_two_types(run: Run, name: str) -> None:
    change = to_matrix(lambda tensor: tensor.to(torch.float64))
    run.damage(name, change, lambda path: (path / "manifest.json").unlink(missing_ok=True)).refused(
        r"(is torch\.float\d\d, elsewhere torch\.float\d\d|not what .* holds of it)"
    )


def test_surplus_tensors(run: Run) -> None:
    def add(table: dict) -> bool:
        table["surplus.weight"] = torch.ones(3, 3)
        return True

    run.damage("hf", lambda path: edit(path, add)).refused("left over: surplus.weight")


@pytest.mark.parametrize("name", ["hf", "meta", "mcore", "easylm"])
def test_nonfinite_values_are_allowed_by_option(run: Run, name: str) -> None:
    nan = to_matrix(lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("nan")))
    run.damage("hf", nan)
    if name != "hf":
        target = MEGATRON.get(name) or Target(name)  # type: ignore[arg-type]
        convert(run.source, run.folder / "through", target, allow_nonfinite=True)
        shutil.rmtree(run.source)
        shutil.move(run.folder / "through", run.source)
    run.told = Told(vocab=VOCAB) if name == "mcore" else NOTHING
    run.refused(r"model\.layers\.0\.mlp\.\w+_proj\.weight", "row 3|row 0")
    convert(run.source, run.output, told=run.told, allow_nonfinite=True)
    held = load_file(run.output / "model.safetensors")
    assert sum(bool(tensor.isnan().any()) for tensor in held.values()) == 1


def test_a_cast_to_a_narrow_type_says_what_made_it_infinite(run: Run) -> None:
    run.damage("hf", to_matrix(lambda tensor: tensor * 1e6))
    with pytest.raises(UserError, match=r"or leave out --dtype: float16 holds up to 65504"):
        convert(run.source, run.output, Target(dtype=torch.float16))


def flip(path: Path, part: float) -> None:
    file = weights(path)[-1]
    data = bytearray(file.read_bytes())
    data[int(len(data) * part)] ^= 16
    file.write_bytes(data)


@pytest.mark.parametrize("part", [0.3, 0.6])
@pytest.mark.parametrize("name", [*TORCH, "torch_dist", "ranks"])
def test_one_bit_flipped_is_found_by_checksums(run: Run, name: str, part: float) -> None:
    run.damage(name, lambda path: flip(path, part)).refused("damaged|SHA-256|NaN or infinite|is not what")


@pytest.mark.parametrize("part", [0.3, 0.6])
@pytest.mark.parametrize("name", NO_CHECKSUMS)
def test_one_bit_flipped_is_found_by_a_downloads_manifest(run: Run, name: str, part: float) -> None:
    run.damage(name, lambda path: flip(path, part), manifested=True).refused("SHA-256 that manifest.json says")


def test_one_bit_flipped_is_found_by_the_hubs_name_for_it(run: Run) -> None:
    run.damage("hf")
    file, blobs = run.source / "model.safetensors", run.source / "blobs"
    blobs.mkdir()
    blob = blobs / manifest.sha256(file)
    shutil.move(file, blob)
    file.symlink_to(blob)
    run.right()
    shutil.rmtree(run.output)
    flip(run.source, 0.5)
    run.refused("has another SHA-256")


def test_a_checkpoint_that_changed_is_not_sharded(run: Run, models: Path) -> None:
    run.damage("checkpoint", lambda path: flip(path, 0.5))
    with pytest.raises(UserError, match="SHA-256"):
        shard(run.source, run.output, 2, Stages(1))
    assert [path.name for path in run.folder.iterdir()] == ["source"]


def test_random_damage_is_refused_or_does_not_matter(run: Run) -> None:
    random = torch.Generator().manual_seed(3)
    for name in ("meta", "mcore", "ali", "torch_dist", "ranks", "easylm"):
        for _ in range(4):
            shutil.rmtree(run.source, ignore_errors=True)
            run.damage(name, manifested=name == "easylm")
            files = weights(run.source)
            file = files[int(torch.randint(len(files), (1,), generator=random))]
            data = bytearray(file.read_bytes())
            at = int(torch.randint(len(data), (1,), generator=random))
            data[at : at + 7] = bytes(byte ^ 255 for byte in data[at : at + 7])
            file.write_bytes(data)
            try:
                run.right()
            except UserError:
                assert not run.output.exists()
            shutil.rmtree(run.output, ignore_errors=True)


class Evil:
    """Would make a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", [*TORCH, "torch_dist", "easylm"])
def test_a_crafted_pickle_is_refused_and_nothing_runs(run: Run, name: str, tmp_path: Path) -> None:
    evil = Evil(tmp_path / "ran")

    def craft(path: Path) -> None:
        if name == "easylm":
            (path / "metadata.pkl").write_bytes(pickle.dumps({"llama_config": evil}))
        elif name == "torch_dist":
            (path / "iter_0000001/.metadata").write_bytes(pickle.dumps(evil))
        else:
            saved = torch.load(weights(path)[0], weights_only=False)
            torch.save(saved | {"more": evil}, weights(path)[0])

    run.damage(name, craft).refused(r"is refused: it asks for posix\.system and could run code")
    assert not evil.mark.exists()


def weight_map(change: dict[str, str]) -> Damage:
    def damage(path: Path) -> None:
        file = path / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"] |= change
        file.write_text(json.dumps(index))

    return damage


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../hf/model.safetensors", "which is no file beside it"),
        ("/etc/passwd", "which is no file beside it"),
        ("..", "is missing"),
        ("", "is missing"),
        ("model-00009-of-00003.safetensors", "model-00009-of-00003.safetensors is missing, but the index"),
        ("model-00002-of-00003.safetensors", "the index of .* disagree on"),
    ],
)
def test_an_index_that_is_wrong(run: Run, file: str, message: str) -> None:
    run.damage("indexed", weight_map({"model.embed_tokens.weight": file})).refused(message)


def test_an_index_that_is_no_index(run: Run) -> None:
    run.damage("indexed")
    for text in ("", "[1]", '{"weight_map": 3}', "[" * 100_000, '{"weight_map": {"a": 1}}'):
        (run.source / "model.safetensors.index.json").write_text(text)
        run.refused(r"index\.json")


@pytest.mark.parametrize("length", [101 * 10**6, 1 << 62])
def test_a_huge_header(run: Run, length: int) -> None:
    run.damage("hf")
    with (run.source / "model.safetensors").open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
        if length < 1 << 40:
            file.truncate(length + 8)
    run.refused("header of 101000000 bytes|truncated or not safetensors")


def test_names_that_ask_for_many_ranks(run: Run) -> None:
    run.damage(
        "legacy", lambda path: (path / "iter_0000001/mp_rank_01").rename(path / "iter_0000001/mp_rank_9999999999")
    )
    run.refused(r"has files of tp 10000000000 x pp 1 ranks, but not of tp 1, pp 0, tp 2, pp 0")
    (run.source / "latest_checkpointed_iteration.txt").write_text("9" * 5000)
    run.refused("is no folder beside it")


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("hf", "config.json", {"num_hidden_layers": 10**9}, "num_layers is 1000000000, but has to be"),
        ("hf", "config.json", {"rms_norm_eps": float("nan")}, "norm_eps is nan"),
        ("hf", "config.json", {"rope_scaling": "linear"}, "rope_scaling is 'linear', no table"),
        ("hf", "config.json", {"rope_scaling": {"type": "linear", "factor": 0}}, "numbers above 0"),
        ("hf", "config.json", {"architectures": 3}, "architecture 'none'"),
        ("hf", "config.json", {"tie_word_embeddings": []}, r"tie_embeddings is \[\]"),
        ("hf", "config.json", {"num_attention_heads": 8, "num_key_value_heads": 3}, "cannot share"),
        ("meta", "params.json", {"n_layers": 10**9}, "num_layers is 1000000000, but has to be"),
        ("meta", "params.json", {"n_heads": 0}, "zero"),
    ],
)
def test_settings_that_cannot_be(run: Run, name: str, file: str, change: dict, message: str) -> None:
    run.damage(name)
    path = run.source / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    run.refused(message, re.escape(file))


def test_more_layers_than_params_say(run: Run) -> None:
    run.damage("meta")
    params = json.loads((run.source / "params.json").read_text())
    (run.source / "params.json").write_text(json.dumps(params | {"n_layers": 3}))
    run.refused(r"left over: layers\.3")
