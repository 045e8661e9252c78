"""Megatron-LLM: our files are those of its own tools, theirs are read to their source, its models' logits are ours."""

import enum
import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from originals import ROOT, ident, state_dict, tensors
from tiny import SHAPES
from tiny import write as write_llama
from tiny_falcon import state_dict as falcon_state_dict
from tiny_falcon import write as write_falcon

from llmpipe.checkpoint.hf import HfSource
from llmpipe.checkpoint.megatron.dialect import Written
from llmpipe.checkpoint.megatron.dialects import named
from llmpipe.checkpoint.megatron.source import MegatronSource
from llmpipe.checkpoint.megatron.write import write as write_megatron
from llmpipe.checkpoint.mover import Mover
from llmpipe.errors import UserError
from llmpipe.families import Shape
from llmpipe.layout import Stages
from llmpipe.verify.compare import run
from llmpipe.verify.megatron import MegatronModel

Case = dict[str, Any]
CASES: list[Case] = json.loads((ROOT / "docs/proof/megatron_llm.json").read_text())["cases"]
FRESH = [c for c in CASES if "hf_to_megatron" in c["direction"] and "2_shards" not in c["case"]]
SAVED = [c for c in CASES if "checkpoint_util" in c["direction"]]
EXPORTED = [c for c in CASES if "megatron_to_hf" in c["direction"]]
FORWARD = [c for c in CASES if "forward" in c["direction"]]
VOCAB = 131
WRITTEN = Written(2, Stages(2), torch.float32, 256, 128)
LOST = {"rope_theta": 23000.0, "layernorm_epsilon": 3e-5}


def label(case: Case) -> str:
    return f"{case['case']}-{ident(case)}"


def dtype_of(case: Case) -> torch.dtype:
    """What the original wrote: its converter makes fp32 of everything that it reads through transformers."""
    return getattr(torch, "float32" if case in FRESH else case["dtype"])


def source_of(case: Case, path: Path) -> HfSource:
    if not path.exists():
        write = write_llama if case["shape"] in SHAPES else write_falcon
        write(case["shape"], path, getattr(torch, case["dtype"]))
    return HfSource(path)


def our_files(case: Case, root: Path, vocab_multiple: int = 128) -> dict[str, Any]:
    """What we write for a case: each file as torch opens it."""
    source = source_of(case, root.parent / "hf")
    root.mkdir()
    stages = Stages(case["pp"])
    hashes = write_megatron(Mover(source), root, named("epf"), case["tp"], stages, dtype_of(case), vocab_multiple)
    return {name: torch.load(root / name, weights_only=False) for name in hashes if name.endswith(".pt")}


def recorded(case: Case) -> dict[str, Any]:
    """The original's tensors, without the notes on the levels of its tables."""
    return {
        file: {name: {key: entry[key] for key in ("shape", "dtype", "sha256")} for name, entry in entries.items()}
        for file, entries in case["files"].items()
    }


def levels(tree: Any, path: tuple[str, ...]) -> list[str]:
    """The paths of tensors through the tables."""
    if isinstance(tree, dict):
        return [found for key, below in tree.items() for found in levels(below, (*path, key))]
    return ["|".join(path)]


@pytest.mark.parametrize("case", SAVED, ids=label)
def test_we_write_what_the_original_writes(case: Case, tmp_path: Path) -> None:
    trees = our_files(case, tmp_path / "root")
    assert {name: tensors(tree["model"]) for name, tree in trees.items()} == recorded(case)
    assert (tmp_path / "root/latest_checkpointed_iteration.txt").read_text() == "release"
    for name, tree in trees.items():
        noted = [entry["levels"] for entry in case["files"][name].values() if "levels" in entry]
        assert set(noted) <= set(levels(tree["model"], ("model",)))
        outer = case["other content"]
        assert (tree["iteration"], tree["checkpoint_version"]) == (outer["iteration"], outer["checkpoint_version"])


def test_our_args_are_some_of_the_originals() -> None:
    """All that we write are arguments of its command line, or what it adds to them itself."""
    theirs, ours = SAVED[0]["other content"]["args"], vars(named("epf").write_args(shape_of("mha_4"), WRITTEN))
    own = {"vocab_size", "iteration"}  # the true vocabulary, which it keeps nowhere; its converter's word
    assert set(ours) - set(theirs) == own
    same = set(ours) & set(theirs) - {"max_position_embeddings", "seq_length", "hidden_dropout", "attention_dropout"}
    different = {name for name in same if ours[name] != theirs[name]}
    assert {name: ours[name] for name in different if name in LOST} == LOST
    assert different - set(LOST) == {"params_dtype", "position_embedding_type"}  # in words there, in a string here


def shape_of(name: str) -> Shape:
    num_layers, hidden, num_heads, num_kv_heads, head_dim, ffn, vocab = SHAPES[name]
    return Shape(
        family="llama", num_layers=num_layers, hidden=hidden, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, ffn=ffn, vocab=vocab, max_positions=256, norm_eps=3e-5, rope_theta=23000.0,
    )  # fmt: skip


@pytest.mark.parametrize("case", SAVED, ids=label)
def test_we_read_what_we_wrote(case: Case, tmp_path: Path) -> None:
    """Nothing is named: the args say the whole shape."""
    our_files(case, tmp_path / "root")
    found, source = MegatronSource(tmp_path / "root"), HfSource(tmp_path / "hf")
    assert (found.dialect.name, found.shape) == ("epf", source.shape)
    assert_same(found, source)


def assert_same(found: MegatronSource, source: HfSource) -> None:
    assert list(found.keys()) == list(source.keys())
    for key in source.keys():  # noqa: SIM118
        assert torch.equal(found.read(key), source.read(key).to(found.dtype(key))), key


@pytest.mark.parametrize("case", SAVED, ids=label)
def test_we_read_what_its_training_writes(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The args are the original's, with members of its enumerations; what they lost is said by the shape."""
    positions = its_enumeration(monkeypatch)
    args = case["other content"]["args"]
    args = SAVED[0]["other content"]["args"] | {k: v for k, v in args.items() if k in SAVED[0]["other content"]["args"]}
    args |= {"position_embedding_type": positions.rotary, "params_dtype": dtype_of(case)}
    for name, tree in our_files(case, tmp_path / "root").items():
        torch.save(tree | {"args": Namespace(**args)}, tmp_path / "root" / name)
    check_read(case, args, tmp_path)


def its_enumeration(monkeypatch: pytest.MonkeyPatch) -> Any:
    """megatron.model.enums.PositionEmbeddingType, which is pickled by its name."""
    for name in ("megatron", "megatron.model", "megatron.model.enums"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    kind = enum.Enum("PositionEmbeddingType", {"rotary": 1, "absolute": 2}, module="megatron.model.enums")
    monkeypatch.setattr(sys.modules["megatron.model.enums"], "PositionEmbeddingType", kind, raising=False)
    return kind


def check_read(case: Case, args: dict[str, Any], tmp_path: Path) -> None:
    """With the shape, and without it; Llama 1's eps is one that nobody has by default, so its args are believed."""
    root, source = tmp_path / "root", HfSource(tmp_path / "hf")
    lost = {"norm_eps": args.get("layernorm_epsilon", 1e-5), "rope_theta": args.get("rope_theta", 1e4)}
    said = {"max_positions": args["max_position_embeddings"]}
    if args.get("sliding_window_size"):
        said |= {"family": "mistral", "window": args["sliding_window_size"]}
    as_said = MegatronSource(root, vocab=VOCAB)
    assert as_said.shape == replace(source.shape, **said, **lost)
    expected = replace(source.shape, **said, **(lost if lost["norm_eps"] == 1e-6 else {}))
    found = MegatronSource(root, expected)
    assert (found.dialect.name, found.shape) == ("epf", expected)
    assert_same(found, source)


@pytest.mark.parametrize("case", [case for case in FRESH if "old" not in case["case"]], ids=label)
def test_we_read_what_its_converter_writes(case: Case, tmp_path: Path) -> None:
    ((name, tree),) = our_files(case, tmp_path / "root", 1).items()
    args = case["other content"]["args"]
    model = as_its_converter(tree["model"])
    assert {name: tensors(model)} == recorded(case)
    noted = {entry["levels"] for entry in case["files"][name].values() if "levels" in entry}
    assert noted <= set(levels(model, ("model",)))
    torch.save(tree | {"args": Namespace(**args), "model": model}, tmp_path / "root" / name)
    check_read(case, args, tmp_path)


def as_its_converter(model: dict[str, Any]) -> dict[str, Any]:
    """Our file's tables with the names that hf_to_megatron.py gives."""
    language = model["language_model"]
    transformer = {key.replace(".self_attention.", ".attention."): t for key, t in language["encoder"].items()}
    embedding = {"word_embeddings.weight": language["embedding"]["word_embeddings"]["weight"]}
    head = {"lm_head": language["lm_head"]} if "lm_head" in language else {}
    return {"language_model": {"embedding": embedding, "transformer": transformer} | head}


def test_the_first_permutation_is_read_and_upgraded(tmp_path: Path) -> None:
    """q and k in half-split order, as our hands put them: the record's digests before and after its permute_qkv.py."""
    old, upgraded = (case for case in CASES if case["case"] == "llama2_old")
    ((name, tree),) = our_files(old, tmp_path / "root", 1).items()
    encoder = tree["model"]["language_model"]["encoder"]
    heads, kv_heads, size = SHAPES[old["shape"]][2:5]
    for key in [key for key in encoder if "query_key_value" in key]:
        parts = list(encoder[key].split(size))
        for i, part in enumerate(parts):
            if i % (heads // kv_heads + 2) != heads // kv_heads + 1:  # the last of a group is v
                parts[i] = torch.cat((part[0::2], part[1::2]))
        encoder[key] = torch.cat(parts)
    assert {name: tensors(as_its_converter(tree["model"]))} == recorded(old)
    torch.save(tree, tmp_path / "root" / name)
    found = MegatronSource(tmp_path / "root", dialect="epf-old")
    assert_same(found, HfSource(tmp_path / "hf"))
    (tmp_path / "new").mkdir()
    hashes = write_megatron(Mover(found), tmp_path / "new", named("epf"), upgraded["tp"], Stages(1))
    again = {n: torch.load(tmp_path / "new" / n, weights_only=False) for n in hashes if n.endswith(".pt")}
    assert {n: tensors(tree["model"]) for n, tree in again.items()} == recorded(upgraded)
    with pytest.raises(UserError, match="--dialect epf-old is for reading"):
        write_megatron(Mover(found), tmp_path / "new", named("epf-old"), 1, Stages(1))


@pytest.mark.parametrize("case", EXPORTED, ids=label)
def test_its_way_back_gives_the_source_and_loses_what_we_carry(case: Case) -> None:
    """Theta and eps are constants by the model's name, and the padded vocabulary is taken for the true one."""
    exported = {name: entry for entries in recorded(case).values() for name, entry in entries.items()}
    state = state_dict(case["shape"]) if case["shape"] in SHAPES else falcon_state_dict(case["shape"])
    different = {name for name, entry in tensors(state).items() if exported[name] != entry}
    assert different == {name for name in state if "embed" in name or "lm_head" in name}
    assert exported.keys() == state.keys()
    config = case["config.json"]
    assert (config["vocab_size"], config["rope_theta"]) == (256, 10000.0)
    assert config.get("rms_norm_eps", config.get("layer_norm_epsilon")) == 1e-5


@pytest.mark.parametrize("case", FORWARD, ids=label)
def test_our_plain_forward_is_its_models(case: Case, tmp_path: Path) -> None:
    our_files(case, tmp_path / "root")
    side = MegatronModel(tmp_path / "root")
    logits = run(side, torch.tensor(case["tokens"])[None], torch.tensor(case["positions"])[None])
    expected = torch.tensor(case["logits"])
    found = logits[0, case["listed"]]
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "knows no rope scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, None),
        ({"qkv_bias": True}, "knows no biases"),
        ({"tie_embeddings": True}, "knows no Llama whose head is its embedding"),
        ({"head_dim": 16}, "knows no heads of other sizes than hidden / heads"),
        ({"num_layers": 5}, r"knows no stages of 2, 3 layers, but equal ones"),
    ],
)
def test_what_its_models_do_not_compute_is_not_written(changes: Case, words: str | None) -> None:
    shape = replace(shape_of("mha_4"), **changes)
    written = replace(WRITTEN, stages=Stages(2, 1, (2, 3))) if shape.num_layers == 5 else WRITTEN
    if words is None:
        assert named("epf").read_args(named("epf").write_args(shape, written))["rope_scaling"] == shape.rope_scaling
        return
    with pytest.raises(UserError, match=words):
        named("epf").write_args(shape, written)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"glu_activation": "geglu"}, "its args say glu_activation 'geglu'"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type 'absolute'"),
        ({"use_post_ln": True}, "use_post_ln True"),
        ({"use_rms_norm": False}, "use_rms_norm False"),
        ({"use_bias": True}, "use_bias True"),
    ],
)
def test_other_arithmetic_is_refused(changes: Case, words: str) -> None:
    args = Namespace(**(FRESH[0]["other content"]["args"] | changes))
    with pytest.raises(UserError, match=words):
        named("epf").read_args(args)
