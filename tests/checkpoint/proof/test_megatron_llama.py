"""Both Megatron-LLaMAs: our files are those of their own converters, and theirs are read back to their source."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import cases, flat, ident, state_dict, tensors, write

from llmpipe.checkpoint import hf
from llmpipe.checkpoint.hf import HfSource
from llmpipe.checkpoint.megatron.dialects import named
from llmpipe.checkpoint.megatron.source import MegatronSource
from llmpipe.checkpoint.megatron.write import write as write_megatron
from llmpipe.checkpoint.mover import Mover
from llmpipe.errors import UserError
from llmpipe.layout import Stages
from llmpipe.verify.compare import run
from llmpipe.verify.megatron import MegatronModel

CASES = [("ali", case) for case in cases("megatron_llama_ali", "hf_to_megatron")]
CASES += [("mfz", case) for case in cases("megatron_llama_mfz", "pth_to_megatron")]
IDS = [f"{dialect}-{ident(case)}" for dialect, case in CASES]
HEAD = "model.lm_head.weight"
VOCAB = 131


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> HfSource:
    """The tiny checkpoint of a case."""
    write(request.node.callspec.params["case"]["shape"], tmp_path / "hf")
    return HfSource(tmp_path / "hf")


def our_files(source: HfSource, dialect: str, case: dict[str, Any], root: Path) -> dict[str, Any]:
    """What we write for a case: each file as torch opens it."""
    root.mkdir()
    dtype, stages = getattr(torch, case["dtype"]), Stages(case["pp"])
    multiple = case["make_vocab_size_divisible_by"]
    hashes = write_megatron(Mover(source), root, named(dialect), case["tp"], stages, dtype, multiple)
    files = {name: root / name for name in hashes if name.endswith(".pt")}
    return {name: torch.load(file, weights_only=False) for name, file in files.items()}  # our own files


@pytest.mark.parametrize(("dialect", "case"), CASES, ids=IDS)
def test_we_write_what_the_original_writes(
    source: HfSource, dialect: str, case: dict[str, Any], tmp_path: Path
) -> None:
    """Alibaba's head alone has padded rows, as its model has, where its converter leaves it true ones."""
    trees = our_files(source, dialect, case, tmp_path / "root")
    assert (tmp_path / "root/latest_checkpointed_iteration.txt").read_text() == case["tracker"]
    assert trees.keys() == case["files"].keys()
    for name, tree in trees.items():
        found = flat(tree)
        if HEAD in found:
            assert len(found[HEAD]) == tree["args"].padded_vocab_size
            assert (found[HEAD][VOCAB:] == found[HEAD][VOCAB - 1]).all()
            found[HEAD] = found[HEAD][:VOCAB].clone()
        assert tensors(found) == case["files"][name]


@pytest.mark.parametrize("case", [case for dialect, case in CASES if dialect == "ali"], ids=ident)
def test_our_args_say_what_the_originals_say(source: HfSource, case: dict[str, Any], tmp_path: Path) -> None:
    trees = our_files(source, "ali", case, tmp_path / "root")
    prefix = "args (SimpleNamespace)."
    said = {name.removeprefix(prefix): v for name, v in case["others"]["*"].items() if name.startswith(prefix)}
    assert said.pop("tokenizer_type") == "GPT2BPETokenizer"  # no Llama has it
    for tree in trees.values():
        ours = vars(tree["args"]) | {"params_dtype": str(tree["args"].params_dtype)}
        assert {name: ours[name] for name in said} == said
        # what its way back asks for, and its converter leaves out
        assert (ours["layernorm_epsilon"], ours["seq_length"]) == (source.shape.norm_eps, 256)


def test_alibabas_way_back_finds_all_layers(tmp_path: Path) -> None:
    """It stops at the first name that is no layer's, so the last norm has to come after them."""
    case = {"dtype": "float32", "tp": 1, "pp": 1, "make_vocab_size_divisible_by": 1}
    write("mha_6", tmp_path / "hf")
    (tree,) = our_files(HfSource(tmp_path / "hf"), "ali", case, tmp_path / "root").values()
    names = list(tree["model"]["language_model"]["encoder"])
    assert [name for name in names if not name.startswith("layers.")] == names[-1:] == ["final_layernorm.weight"]


@pytest.mark.parametrize(("dialect", "case"), CASES, ids=IDS)
def test_we_read_what_we_wrote(source: HfSource, dialect: str, case: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is named: the args say the whole shape, theta too, for which the originals have none."""
    our_files(source, dialect, case, tmp_path / "root")
    found = MegatronSource(tmp_path / "root")
    assert (found.dialect.name, found.shape) == (dialect, source.shape)
    assert as_hf(found, tmp_path / "again") == tensors(state_dict(case["shape"], getattr(torch, case["dtype"])))


@pytest.mark.parametrize(("dialect", "case"), CASES, ids=IDS)
def test_we_read_the_originals_files(source: HfSource, dialect: str, case: dict[str, Any], tmp_path: Path) -> None:
    """Whose args are None, or lack norm eps and theta: the shape that is named says them."""
    for name, tree in our_files(source, dialect, case, tmp_path / "root").items():
        as_the_original(tree, dialect)
        torch.save(tree, tmp_path / "root" / name)
        assert tensors(tree) == case["files"][name]
    with pytest.raises(UserError, match="--vocab N" if dialect == "mfz" else "norm_eps: name the .* with --shape"):
        MegatronSource(tmp_path / "root")
    found = MegatronSource(tmp_path / "root", source.shape)
    assert (found.dialect.name, found.shape) == (dialect, source.shape)
    assert as_hf(found, tmp_path / "again") == tensors(state_dict(case["shape"], getattr(torch, case["dtype"])))


@pytest.mark.parametrize("dialect", ["ali", "mfz"])
def test_our_plain_forward_is_its_models(dialect: str, tmp_path: Path) -> None:
    """In which theta is a constant, 10000, whatever the checkpoint was made of."""
    (case,) = cases(f"megatron_llama_{dialect}", "forward")
    write(case["shape"], tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"rope_theta": case["rope_theta"]}))
    our_files(HfSource(tmp_path / "hf"), dialect, case, tmp_path / "root")
    tokens = torch.tensor(case["tokens"])[None]
    logits = run(MegatronModel(tmp_path / "root"), tokens, torch.arange(tokens.shape[1])[None])
    expected = torch.tensor(case["logits"])
    assert (logits[0, case["listed"]] - expected).abs().max() <= 1e-6 * expected.abs().max()


def as_the_original(tree: dict[str, Any], dialect: str) -> None:
    """Our file, made into the very one that the original wrote."""
    if dialect == "mfz":
        tree["args"] = None
        return
    for name in ("layernorm_epsilon", "rotary_base"):
        delattr(tree["args"], name)
    if "lm_head" in tree["model"]:
        tree["model"]["lm_head"]["weight"] = tree["model"]["lm_head"]["weight"][:VOCAB].clone()


def as_hf(source: MegatronSource, path: Path) -> dict[str, Any]:
    """Its tensors in a Hugging Face checkpoint."""
    path.mkdir()
    hf.write(Mover(source), path)
    from safetensors.torch import load_file

    return tensors(load_file(path / "model.safetensors"))
