"""The command lines of the model card: their options say what config.json says, for as many processes as ranks.

Each option was looked up in the original's own argument parser (Megatron-LLM 806a833, alibaba's 25306de, MinfanZhao's
llama-sft, EasyLM fe5b2c3, Megatron-LM of 2025).
"""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmpipe.checkpoint.convert import Target
from llmpipe.export.export import export
from llmpipe.export.usage import usage
from llmpipe.families import Shape, named_size
from llmpipe.layout import Stages

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def options(code: str) -> dict[str, str]:
    """What follows each option of a command; nothing for a switch."""
    words = shlex.split(code.replace("\\\n", " "))
    found: dict[str, str] = {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            found[name] = value if equals else "" if after.startswith("--") else after
    return found


@pytest.fixture
def config(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "config.json").read_text())


def command_of(run: Path, directory: Path, target: Target) -> dict[str, str]:
    """The options of the card's command."""
    export(run, directory, target)
    (code,) = re.findall(r"```sh\n(.*?)\n```", (directory / "README.md").read_text(), re.DOTALL)
    return options(code)


def test_meta(run: Path, tmp_path: Path) -> None:
    found = command_of(run, tmp_path / "out", Target("meta", tp=2))
    assert int(found["--nproc_per_node"]) == len(list((tmp_path / "out").glob("consolidated.*.pth")))
    assert found["--ckpt_dir"] == "PATH_OF_THIS_DIRECTORY"
    assert (tmp_path / "out" / found["--tokenizer_path"].partition("/")[2]).is_file()


def sized(name: str, **changes: object) -> Shape:
    """A size of the table, changed."""
    shape = named_size(name)
    assert shape is not None
    return replace(shape, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "repository", "program"),
    [
        (sized("llama2_7b"), "meta-llama/llama,", "example_text_completion.py"),
        (sized("llama2_7b", rope_theta=1e6), "meta-llama/codellama,", "example_completion.py"),
        (sized("llama3_8b"), "meta-llama/llama3,", "example_text_completion.py"),
        (sized("llama3_8b", rope_scaling=LLAMA3), "meta-llama/llama-models,", "-m models.llama3.scripts.completion"),
    ],
)
def test_each_llama_of_meta_has_code_of_its_own(shape: Shape, repository: str, program: str, tmp_path: Path) -> None:
    found = usage(Target("meta"), shape, torch.bfloat16, tmp_path)
    assert repository in found.system and f"torchrun --nproc_per_node 1 {program}" in found.code
    assert str(shape.vocab) in found.notes[0]


def test_megatron_lm(run: Path, tmp_path: Path, config: dict) -> None:
    found = command_of(run, tmp_path / "out", Target("megatron", "mcore", 2, Stages(2), torch.bfloat16))
    assert int(found["--nproc_per_node"]) == len(list((tmp_path / "out" / "iter_0000001").iterdir()))
    assert (found["--tensor-model-parallel-size"], found["--pipeline-model-parallel-size"]) == ("2", "2")
    assert float(found["--norm-epsilon"]) == config["rms_norm_eps"]
    assert float(found["--rotary-base"]) == config["rope_parameters"]["rope_theta"]
    assert found["--load"] == "PATH_OF_THIS_DIRECTORY" and found["--tokenizer-type"] == "Llama2Tokenizer"
    assert {"--use-checkpoint-args", "--bf16"} <= found.keys() and not {"--fp16", "--use-rope-scaling"} & found.keys()


def test_what_megatron_lm_does_not_take_from_the_file_is_said(tmp_path: Path) -> None:
    """load_args_from_checkpoint knows neither theta, scaling, windows, q and k norms nor uneven stages."""
    shape = sized("llama3_8b", rope_scaling=LLAMA3, window=4096, qk_norm=True)
    target = Target("megatron", "mcore", 1, Stages(2, layers=(15, 17)))
    found = options(usage(target, shape, torch.float32, tmp_path).code)
    assert (found["--use-rope-scaling"], found["--rope-scaling-factor"], found["--rotary-base"]) == ("", "8", "500000")
    assert found["--window-size"] == "4095,0" and "--qk-layernorm" in found
    assert found["--decoder-first-pipeline-num-layers"] == "15"
    assert found["--decoder-last-pipeline-num-layers"] == "17"
    assert found["--tokenizer-type"] == "HuggingFaceTokenizer"  # no tokenizer.model lies there
    linear = replace(shape, rope_scaling={"rope_type": "linear", "factor": 4.0}, window=None)
    virtual = Target("megatron", "legacy", 1, Stages(2, 2))
    found = options(usage(virtual, linear, torch.float32, tmp_path).code)
    assert found["--rotary-seq-len-interpolation-factor"] == "4" and "--use-legacy-models" in found
    assert found["--num-layers-per-virtual-pipeline-stage"] == "8"


def test_megatron_llm(run: Path, tmp_path: Path, config: dict) -> None:
    found = command_of(run, tmp_path / "out", Target("megatron", "epf", 2))
    assert found["--nproc_per_node"] == "2" and found["--model_name"] == "llama2"
    assert float(found["--layernorm_epsilon"]) == config["rms_norm_eps"]
    assert float(found["--rope_theta"]) == config["rope_parameters"]["rope_theta"]
    assert (tmp_path / "out" / found["--vocab_file"].partition("/")[2]).is_file()
    falcon = options(usage(Target("megatron", "epf"), sized("falcon_7b"), torch.bfloat16, tmp_path).code)
    assert "--parallel_attn" in falcon and "--glu_activation" not in falcon


@pytest.mark.parametrize(("dialect", "eps"), [("ali", "--layernorm-epsilon"), ("mfz", "--rmsnorm-epsilon")])
def test_both_megatron_llamas_take_everything_from_the_command_line(dialect: str, eps: str, tmp_path: Path) -> None:
    shape = sized("llama2_7b")
    found = options(usage(Target("megatron", dialect, 4), shape, torch.float16, tmp_path).code)
    sizes = [found[f"--{name}"] for name in ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads")]
    assert sizes == ["32", "4096", "11008", "32"] and float(found[eps]) == 1e-5 and "--fp16" in found


def test_minfanzhaos_code_computes_the_mlps_size_itself(tmp_path: Path) -> None:
    """256 * ((int(8 / 3 * 4096) + 255) // 256) = 11008: Llama 2 7B's, and no other's."""
    target, shape = Target("megatron", "mfz"), sized("llama2_7b")
    assert len(usage(target, shape, torch.float16, tmp_path).notes) == 1
    told = usage(target, replace(shape, ffn=11264), torch.float16, tmp_path).notes[1]
    assert "makes an MLP of 11008 rows" in told and "this model has 11264" in told


def test_easylm(run: Path, tmp_path: Path, config: dict) -> None:
    found = command_of(run, tmp_path / "out", Target("easylm"))
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings")  # fmt: skip
    assert {name: int(found[f"--llama.{name}"]) for name in names} == {name: config[name] for name in names}
    assert float(found["--llama.rms_norm_eps"]) == config["rms_norm_eps"] and found["--dtype"] == "fp32"
    kind, path = found["--load_checkpoint"].split("::")
    assert kind == "params" and (tmp_path / "out" / path.partition("/")[2]).is_file()


def test_what_easylm_computes_otherwise_is_said(tmp_path: Path) -> None:
    assert "rope_theta 10000" in usage(Target("easylm"), sized("llama3_8b"), torch.bfloat16, tmp_path).notes[1]
