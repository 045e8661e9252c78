"""Context ranks against transformers, and the isolation of documents on each of them."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from hf_twins import VOCAB, in_our_names, shape_of, theirs
from llmpipe.layout import Layout, Stages, context_slices
from llmpipe.model.decoder import Decoder
from llmpipe.model.load import local_slices
from llmpipe.parallel.groups import Groups, make_groups
from llmpipe.parallel.processes import run_ranks

NAMES = [
    "llama", "llama, linear", "llama, dynamic", "llama, llama3", "llama, yarn", "mistral, window",
    "qwen2, windows from layer 1", "qwen3, biases", "falcon 40b", "falcon, 4 heads",
]  # fmt: skip
LONG = [0, 5, 38, 128]
"""The last text is longer than the twins' 48 positions. Ascending: transformers' dynamic scaling keeps the longest."""
SHORT = [0, 5, 18, 32]
STAGES = Stages(2, layers=(1, 2))
WINDOW = 7  # of "mistral, window"


def groups_of(layout: dict[str, int]) -> Groups:
    made = Layout(**layout, gpus_per_node=layout["cp"] * layout.get("tp", 1), device="cpu").resolved()
    return make_groups(made, torch.device("cpu"))


def decoder_of(name: str, groups: Groups, stages: Stages, stage: int) -> Decoder:
    """A rank's part of our decoder, with a twin's weights."""
    reference = theirs(name)
    shape = shape_of(reference)
    weights = in_our_names(reference.state_dict(), shape)
    model = Decoder(shape, groups.tp, stages, stage, cp=groups.cp)
    for key, parameter in model.named_parameters():
        parameter.data.copy_(weights[key][local_slices(shape, key, groups.tp.size, groups.tp.rank)])
    return model


def own(x: torch.Tensor, cp: int, rank: int) -> torch.Tensor:
    """(N,) of all context ranks → (N/cp,) of one."""
    return torch.cat([x[part] for part in context_slices(len(x), cp, rank)])


def tokens_and_labels() -> torch.Tensor:
    return torch.randint(VOCAB, (2, LONG[-1]), generator=torch.Generator().manual_seed(0))


def logits_and_gradients(names: list[str], cp: int) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """A context rank's logits of its own tokens by every model, and the gradients of its own tokens' losses."""
    groups, found = groups_of({"cp": cp}), {}
    tokens, labels = (own(x, cp, groups.at.cp) for x in tokens_and_labels())
    bounds = torch.tensor(LONG, dtype=torch.int32)
    for name in names:
        model = decoder_of(name, groups, Stages(), 0)
        logits = model(tokens, bounds).detach()
        model(tokens, bounds, labels, torch.ones(len(tokens))).sum().backward()
        found[name] = logits.numpy(), {key: p.grad.numpy() for key, p in model.named_parameters()}
    return found


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request) -> list[dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]]:
    return run_ranks(logits_and_gradients, request.param, NAMES, request.param)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_those_of_transformers_document_by_document(name: str, ranks) -> None:
    reference, (tokens, labels) = theirs(name), tokens_and_labels()
    expected = torch.cat([reference(tokens[None, a:b]).logits[0] for a, b in pairwise(LONG)])  # (N, V)
    torch.nn.functional.cross_entropy(expected, labels, reduction="sum").backward()
    for rank, found in enumerate(ranks):
        logits = torch.from_numpy(found[name][0])
        assert (logits - own(expected, len(ranks), rank)).abs().max() <= 1e-5 * expected.abs().max()
    theirs_ = {key: p.grad for key, p in reference.named_parameters() if p.grad is not None}
    for key, gradient in in_our_names(theirs_, shape_of(reference)).items():
        summed = torch.from_numpy(sum(found[name][1][key] for found in ranks))
        assert (summed - gradient).abs().max() <= 1e-4 * gradient.abs().max(), key


def what_moves(name: str, layout: dict[str, int]) -> list[np.ndarray]:
    """(N, N/cp) of each stage: when token i changes, do this rank's outputs move?"""
    groups = groups_of(layout)
    chain = [decoder_of(name, groups, STAGES, stage) for stage in range(2)]
    tokens = torch.arange(SHORT[-1])
    before = through(chain, tokens, groups)
    moved = []
    for i in range(SHORT[-1]):
        changed = tokens.clone()
        changed[i] = VOCAB - 1
        moved.append([(x != y).any(dim=-1) for x, y in zip(before, through(chain, changed, groups), strict=True)])
    return [torch.stack(rows).numpy() for rows in zip(*moved, strict=True)]


@torch.no_grad()
def through(chain: list[Decoder], tokens: torch.Tensor, groups: Groups) -> list[torch.Tensor]:
    """Each stage's output of a rank: (N / cp / tp, H), and (N/cp, V/tp) of the last."""
    found = [own(tokens, groups.cp.size, groups.cp.rank)]
    for stage in chain:
        found.append(stage(found[-1], torch.tensor(SHORT, dtype=torch.int32)))
    return found[1:]


def may_see(num_layers: int, window: int | None) -> torch.Tensor:
    """(N, N): may output j depend on token i? A layer's window reaches `window` - 1 tokens back."""
    position = torch.arange(SHORT[-1])
    document = torch.searchsorted(torch.tensor(SHORT), position, right=True)
    distance = position - position[:, None]
    reach = SHORT[-1] if window is None else num_layers * (window - 1)
    return (document[:, None] == document) & (distance >= 0) & (distance <= reach)


LAYOUTS = {
    "cp2, llama": ("llama", {"cp": 2}),
    "cp2, window": ("mistral, window", {"cp": 2}),
    "cp4, window": ("mistral, window", {"cp": 4}),
    "cp4, falcon": ("falcon 40b", {"cp": 4}),
    "cp2-tp2, llama": ("llama", {"cp": 2, "tp": 2}),
}


@pytest.mark.parametrize(("name", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_token_moves_its_documents_later_tokens_alone(name: str, layout: dict[str, int]) -> None:
    tp, window = layout.get("tp", 1), WINDOW if "window" in name else None
    for number, stages in enumerate(run_ranks(what_moves, layout["cp"] * tp, name, layout)):
        cp_rank, tp_rank = divmod(number, tp)
        mine = own(torch.arange(SHORT[-1]), layout["cp"], cp_rank)
        for moved, num_layers, columns in zip(stages, (1, 3), (mine.chunk(tp)[tp_rank], mine), strict=True):
            assert torch.equal(torch.from_numpy(moved), may_see(num_layers, window)[:, columns])


def what_gradients_reach(name: str, layout: dict[str, int]) -> np.ndarray:
    """(N, N): has the gradient of token j's logits, which one rank holds, reached this rank's embedding of token i?"""
    groups = groups_of(layout)
    model = decoder_of(name, groups, Stages(), 0)
    tokens, bounds = torch.arange(SHORT[-1]), torch.tensor(SHORT, dtype=torch.int32)
    mine, reached = own(tokens, groups.cp.size, groups.cp.rank), []
    for j in tokens:
        model.zero_grad()
        logits = model(mine, bounds)
        (logits * torch.linspace(1, 2, VOCAB) * (mine == j)[:, None]).sum().backward()
        reached.append((model.embedding.weight.grad[: SHORT[-1]] != 0).any(dim=-1))
    return torch.stack(reached, dim=1).numpy()


@pytest.mark.parametrize("name", ["llama", "mistral, window", "falcon 40b"])
def test_gradients_go_back_as_far(name: str) -> None:
    window = WINDOW if "window" in name else None
    found = sum(run_ranks(what_gradients_reach, 2, name, {"cp": 2}))
    assert torch.equal(torch.from_numpy(found) > 0, may_see(3, window))
