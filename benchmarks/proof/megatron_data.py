"""Runs Megatron's own dataset code on tiny datasets; lists the SHA-256 of what it writes and of the indices it draws.

Repositories: github.com/NVIDIA/Megatron-LM at commit d98e8a64 (2026-08-22), github.com/epfLLM/Megatron-LLM at 806a8330
(2024-05-20); megatron-core 0.16.1 from the Python index. In a Python with torch, sentencepiece and this llmpipe:

    pip install --no-deps megatron-core==0.16.1 triton && pip install pybind11
    make -C MEGATRON_LM/megatron/core/datasets
    python benchmarks/proof/megatron_data.py MEGATRON_LM MEGATRON_LLM WORK docs/proof/megatron_data.json

What is listed, and by whom it was made:

- files: .bin and .idx of the datasets of tiny_data.py, by the IndexedDatasetBuilder of megatron-core and of Megatron-LM
  and by Megatron-LLM's MMapIndexedDatasetBuilder; the three have to agree.
- other_files: Megatron-LLM's older format and its instruction files, by its own classes.
- corpus: .bin and .idx of a JSONL file, by Megatron-LM's tools/preprocess_data.py with --append-eod.
- samplings: the document, sample and shuffle index of every part, those of a blend's datasets end to end, and the two
  arrays of a blend, by BlendedMegatronDatasetBuilder of megatron-core and of Megatron-LM; the two have to agree.
- ours: megatron-core's IndexedDataset and GPTDataset read datasets that llmpipe wrote: the number of sequences and of
  samples whose tokens were those that llmpipe reads.

Stubbed: of Megatron-LLM `megatron.print_rank_0`, because its package asks for apex and CUDA; for preprocess_data.py
`typing.override`, where Python is older than 3.12. Nothing else.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import tiny_data
import torch
from record import commit, write

OLD_TYPES = {"int32": np.int32, "int64": np.int64, "float": float, "double": np.double}


def digest(arrays: list[np.ndarray], dtype: str) -> str:
    """SHA-256 of the numbers of arrays, end to end."""
    return hashlib.sha256(b"".join(array.astype(dtype).tobytes() for array in arrays)).hexdigest()


def digests(prefix: Path) -> dict[str, str]:
    """SHA-256 of both files of a dataset."""
    return {end: hashlib.sha256(Path(f"{prefix}.{end}").read_bytes()).hexdigest() for end in ("bin", "idx")}


def megatron_files(work: Path) -> dict[str, dict[str, str]]:
    """Every dataset, written by the IndexedDatasetBuilder of the Megatron that can be imported."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    for name in tiny_data.DATASETS:
        builder = IndexedDatasetBuilder(f"{work / name}.bin", dtype=DType.optimal_dtype(tiny_data.DATASETS[name][3]))
        for document in tiny_data.documents(name):
            for sequence in document:
                builder.add_item(torch.from_numpy(sequence))
            builder.end_document()
        builder.finalize(f"{work / name}.idx")
    return {name: digests(work / name) for name in tiny_data.DATASETS if name not in tiny_data.FEW}


def megatron_samplings(work: Path) -> dict[str, Any]:
    """Every sampling, drawn by the BlendedMegatronDatasetBuilder of the Megatron that can be imported."""
    return {name: drawn(work, case) for name, case in tiny_data.SAMPLINGS.items()}


def drawn(work: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Digests of the arrays of one sampling, by part."""
    found = {}
    for part, built, wanted in zip(tiny_data.PARTS, build(work, case), case["num_samples"], strict=True):
        if built is None or wanted == 0:
            continue
        single = not hasattr(built, "datasets")
        found[part] = arrays([built] if single else built.datasets)
        if not single:
            found[part]["dataset_index"] = digest([built.dataset_index[:wanted]], "<i2")
            found[part]["dataset_sample_index"] = digest([built.dataset_sample_index[:wanted]], "<i8")
    return found


def build(work: Path, case: dict[str, Any]) -> list[Any]:
    """Megatron's datasets of a sampling: of train, validation and test."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    def blend(data: dict[str, float]) -> tuple[list[str], list[float] | None]:
        return [str(work / name) for name in data], list(data.values()) if len(data) > 1 else None

    tokenizer = SimpleNamespace(eod=0, pad=-7, vocab_size=None, unique_identifiers={})
    if case["split"] is None:
        source = {"blend_per_split": [blend(case["data"][part]) for part in tiny_data.PARTS]}
    else:
        source = {"blend": blend(case["data"]), "split": case["split"]}
    config = GPTDatasetConfig(
        random_seed=case["seed"], sequence_length=case["seq_len"], tokenizer=tokenizer, reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, mid_level_dataset_surplus=0.005,
        path_to_cache=str(work / "cache"), **source,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(GPTDataset, case["num_samples"], lambda: True, config).build()


def arrays(datasets: list[Any]) -> dict[str, str]:
    """Digests of the three indices of GPTDatasets."""
    types = {"document_index": "<i4", "sample_index": "<i8", "shuffle_index": "<u4"}
    return {name: digest([getattr(dataset, name) for dataset in datasets], dtype) for name, dtype in types.items()}


def corpus(repository: Path, work: Path) -> dict[str, Any]:
    """The JSONL file through Megatron-LM's own tool."""
    model, texts = tiny_data.tokenizer_model(work / "tokenizer.model"), tiny_data.text_file(work / "texts.jsonl")
    words = ["--input", texts, "--output-prefix", work / "corpus", "--workers", "1", "--append-eod"]
    words += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    start = "import runpy, typing; vars(typing).setdefault('override', lambda method: method); runpy.run_path("
    start += f"{str(repository / 'tools/preprocess_data.py')!r}, run_name='__main__')"
    command = [sys.executable, "-W", "ignore", "-c", start, *words]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(repository)})
    return {"tokenizer": hashlib.sha256(model.read_bytes()).hexdigest(), **digests(work / "corpus_text_document")}


def megatron_llm(repository: Path) -> ModuleType:
    """Megatron-LLM's indexed_dataset.py."""
    sys.modules["megatron"] = ModuleType("megatron")
    sys.modules["megatron"].print_rank_0 = print  # type: ignore[attr-defined]
    path = repository / "megatron/data/indexed_dataset.py"
    spec = importlib.util.spec_from_file_location("megatron_llm_indexed_dataset", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def megatron_llm_files(repository: Path, work: Path) -> dict[str, Any]:
    """Every dataset in the mmap format, "wide" in the older one with several types, and as instruction files."""
    module = megatron_llm(repository)
    found: dict[str, Any] = {"files": {}, "other_files": {}}
    for name in tiny_data.DATASETS:
        builder = module.make_builder(f"{work / name}.bin", "mmap", tiny_data.DATASETS[name][3])
        written = finished(builder, name, work / name, True)
        found["files"] |= {name: written} if name not in tiny_data.FEW else {}
    for name, dtype in OLD_TYPES.items():
        builder = module.IndexedDatasetBuilder(f"{work / name}.bin", dtype)
        found["other_files"][f"old {name}"] = finished(builder, "wide", work / name, True)
    for kind in ("mmap", "lazy"):
        builder = module.make_builder(f"{work / kind}-text.bin", kind, 32_000)
        found["other_files"][f"instruction {kind}"] = finished(builder, "uneven", work / f"{kind}-text", False)
    return found


def finished(builder: Any, name: str, prefix: Path, end_documents: bool) -> dict[str, str]:
    """A dataset through a builder of Megatron-LLM's; its instruction tool adds items and ends no document."""
    for document in tiny_data.documents(name):
        for sequence in document:
            builder.add_item(torch.IntTensor(sequence))
        if end_documents:
            builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return digests(prefix)


def read_ours(work: Path) -> dict[str, int]:
    """What megatron-core reads of the datasets that llmpipe writes, beside what llmpipe reads."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from llmpipe.data.batches.sampling import Blend
    from llmpipe.data.dataset.indexed import Writer, token_dtype

    counts = {"sequences": 0, "samples": 0}
    for name, (_, _, _, vocab, _) in tiny_data.DATASETS.items():
        with Writer(work / name, token_dtype(vocab)) as writer:
            for document in tiny_data.documents(name):
                sizes = np.array([len(sequence) for sequence in document])
                writer.add(np.concatenate(document), sizes, np.array([len(document)]))
        sequences = [sequence for document in tiny_data.documents(name) for sequence in document]
        theirs = IndexedDataset(str(work / name))
        assert len(theirs) == len(sequences)
        for number, sequence in enumerate(sequences):
            assert np.array_equal(theirs.get(number), sequence)
            counts["sequences"] += 1
    for case in tiny_data.SAMPLINGS.values():
        split = [float(share) for share in f"{case['split'] or '1,0,0'},0".split(",")][:3]
        for part, built, wanted in zip(tiny_data.PARTS, build(work, case), case["num_samples"], strict=True):
            if built is None or wanted == 0:
                continue
            data = case["data"] if case["split"] else case["data"][part]
            data = {work / name: weight for name, weight in data.items()}
            where = part if case["split"] else "train"
            ours = Blend(data, split, where, case["seq_len"], wanted, case["seed"])
            for number in range(wanted):
                sample = built[number]
                text = torch.cat([sample["tokens"], sample["labels"][-1:]])
                assert np.array_equal(ours[number][0], text.numpy()), (case, number)
                counts["samples"] += 1
    return counts


def step(name: str, options: argparse.Namespace, path: Path | None = None) -> Any:
    """One system's part, in a process and a folder of its own."""
    work = options.work / name
    work.mkdir(parents=True)
    environment = os.environ | ({"PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}"} if path else {})
    words = [__file__, options.megatron_lm, options.megatron_llm, work, work / "found.json", "--step", name]
    subprocess.run([sys.executable, "-W", "ignore", *words], check=True, env=environment)
    return json.loads((work / "found.json").read_text())


def run_step(options: argparse.Namespace) -> Any:
    """What `step` asked for."""
    if options.step == "megatron_llm":
        return megatron_llm_files(options.megatron_llm, options.work)
    torch.distributed.init_process_group("gloo", f"file://{options.work}/store", rank=0, world_size=1)
    if options.step == "ours":
        return read_ours(options.work)
    return {"files": megatron_files(options.work), "samplings": megatron_samplings(options.work)}


def main(options: argparse.Namespace) -> None:
    """All systems, one after the other; what several made has to be the same."""
    core, lm = step("megatron_core", options), step("megatron_lm", options, options.megatron_lm)
    llm = step("megatron_llm", options)
    assert core == lm, "megatron-core and Megatron-LM differ"
    assert core["files"] == llm["files"], "megatron-core and Megatron-LLM differ"
    report = {
        "systems": {
            "megatron-core": "0.16.1",
            "Megatron-LM": commit(options.megatron_lm),
            "Megatron-LLM": commit(options.megatron_llm),
        },
        "versions": {"numpy": np.__version__, "torch": torch.__version__},
        "ours": step("ours", options),
        "corpus": corpus(options.megatron_lm, options.work),
        "other_files": llm["other_files"],
        **core,
    }
    write(options.output, report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for word in ("megatron_lm", "megatron_llm", "work", "output"):
        parser.add_argument(word, type=lambda text: Path(text).absolute())
    parser.add_argument("--step")
    given = parser.parse_args()
    if given.step:
        given.output.write_text(json.dumps(run_step(given)))
    else:
        main(given)
