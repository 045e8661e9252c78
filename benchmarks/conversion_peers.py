"""One conversion of a large Hugging Face directory by Megatron-LM's or Megatron-LLM's own converter, for a stopwatch.

    python benchmarks/conversion_peers.py megatron_lm  REPOSITORY SOURCE OUTPUT
    python benchmarks/conversion_peers.py megatron_llm REPOSITORY SOURCE OUTPUT

SOURCE is the checkpoint that benchmarks/conversion.py makes (hidden 4096, 32 heads, vocabulary 32000, any number of
layers); OUTPUT is Megatron's directory for TP2 x PP2 in bf16. Both run on the CPU with what benchmarks/proof puts in
for CUDA, described there with the commits and the Python of its own that each needs (torch 2.13 will do). Beside ours:

    run="env/bin/python benchmarks/conversion_peers.py"
    python benchmarks/conversion.py WORK --layers 4 --peers --only mcore \\
        --peer "Megatron-LM, TP2 x PP2" "$run megatron_lm REPOSITORY {source} {output}" \\
        --peer "Megatron-LLM, TP2 x PP2" "$run megatron_llm REPOSITORY {source} {output}"

The tokenizer's file that both ask for is made beside OUTPUT, as the source has none. Megatron-LLM converts in two
steps, first to one rank and then to all, and keeps the first one's files beside OUTPUT until the end.
"""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

PROOF = Path(__file__).parent / "proof"
sys.path.insert(0, str(PROOF))
TP = PP = "2"
GONE = ("torch.onnx._type_utils", "transformer_engine.pytorch.te_onnx_extensions")


def megatron_lm(repository: Path, source: Path, output: Path) -> None:
    """tools/checkpoint/convert.py, loader llama_mistral, saver mcore."""
    import megatron_lm as proof
    from megatron_lm_stubs import Absent

    given = linked(source, output)
    proof.tokenizer(given, vocab_of(source))
    rest = ["--model-type", "GPT", "--loader", "llama_mistral", "--saver", "mcore", "--load-dir", str(given)]
    rest += ["--save-dir", str(output), "--model-size", "llama2-7B", "--checkpoint-type", "hf", "--bf16"]
    rest += ["--tokenizer-model", str(given), "--target-tensor-parallel-size", TP]
    rest += ["--target-pipeline-parallel-size", PP, "--saver-transformer-impl", "transformer_engine"]
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    for name in GONE:  # from torch since Transformer Engine 1.11, and not called
        sys.modules[name] = Absent(name)
    proof.convert(Namespace(repository=repository, rest=rest))
    shutil.rmtree(given)


def megatron_llm(repository: Path, source: Path, output: Path) -> None:
    """weights_conversion/hf_to_megatron.py, then tools/checkpoint_util.py."""
    import megatron_llm as proof
    import tiny

    config = json.loads((source / "config.json").read_text())
    layers, hidden, heads = (config[f"num_{name}" if name != "hidden_size" else name] for name in
                             ("hidden_layers", "hidden_size", "attention_heads"))  # fmt: skip
    kv, ffn = config["num_key_value_heads"], config["intermediate_size"]
    tiny.SHAPES["large"] = (layers, hidden, heads, kv, hidden // heads, ffn, vocab_of(source))
    if len(sys.argv) > 5:  # a step, in a process of its own
        if sys.argv[5] == "convert":
            proof.step_convert(repository, "large", "llama2", "7", str(source), sys.argv[6], "new")
        else:
            proof.step_reshard(repository, "large", "llama2", TP, PP, sys.argv[6], str(output), "bfloat16")
        return
    between = output.parent / "between" / "one"
    between.parent.mkdir()
    for step in ("convert", "reshard"):
        command = [*sys.argv[:5], step, str(between)]
        subprocess.run(["env", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1", sys.executable, *command], check=True)
    shutil.rmtree(between.parent)


def linked(source: Path, output: Path) -> Path:
    """A directory of links to the source's files, with the positions that Megatron-LM's loader wants."""
    given = output.parent / "given"
    shutil.rmtree(given, ignore_errors=True)
    given.mkdir()
    for file in source.iterdir():
        if file.name != "config.json":
            (given / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (given / "config.json").write_text(json.dumps(config))
    return given


def vocab_of(source: Path) -> int:
    return json.loads((source / "config.json").read_text())["vocab_size"]


if __name__ == "__main__":
    run = {"megatron_lm": megatron_lm, "megatron_llm": megatron_llm}[sys.argv[1]]
    run(*(Path(name).resolve() for name in sys.argv[2:5]))
