"""Best-fit packing against a slow twin, by hand, and what has to hold of any of its rows."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from data_help import dataset

from llmpipe.data.batches.loader import Loader
from llmpipe.data.batches.packing import ChatSamples, best_fit, check_part, open_samples, pack
from llmpipe.data.batches.sampling import Blend, Samples
from llmpipe.data.dataset.indexed import Writer
from llmpipe.errors import UserError

ALL = [1.0, 0.0, 0.0]


def chats(prefix: Path, roles: list[list[int]], first_token: int = 0) -> list[np.ndarray]:
    """A dataset with roles whose tokens are all different; also its documents."""
    documents = dataset(prefix, [len(own) for own in roles], first_token)
    with Writer(prefix.with_name(prefix.name + ".roles"), np.dtype(np.uint8)) as writer:
        for own in roles:
            writer.add(np.array(own), np.array([len(own)]))
    return documents


def some_chats(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    random = np.random.RandomState(seed)
    return [random.choice([0, 1, 2], random.randint(2, longest + 1)).tolist() for _ in range(count)]


def test_best_fit_by_hand() -> None:
    """5 opens a row; 4 one; 3 fits best to 4; 3 opens one; 2 fits best to 5; 2 and 1 are left for the last."""
    sizes = np.array([1, 2, 3, 5, 2, 4, 3])
    assert best_fit(sizes, 7, np.array([0, 1, 2, 3, 4, 5, 6])) == [[3, 1], [5, 2], [6, 4, 0]]
    assert best_fit(sizes, 7, np.array([6, 5, 4, 3, 2, 1, 0])) == [[3, 4], [5, 6], [2, 1, 0]]


def slow_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """The rows' sums, each item put where the least room is left; ties do not change them."""
    rows: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, row in enumerate(rows) if row + size <= capacity]
        if not fitting:
            rows.append(0)
            fitting = [len(rows) - 1]
        rows[max(fitting, key=lambda i: rows[i])] += size
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_the_slow_twins(seed: int) -> None:
    random = np.random.RandomState(seed)
    capacity = int(random.choice([1, 10, 63, 64, 100]))
    sizes = random.randint(1, capacity + 1, 300)
    rows = best_fit(sizes, capacity, random.permutation(300))
    assert sorted(sizes[row].sum() for row in rows) == sorted(slow_best_fit(sizes.tolist(), capacity))
    assert sorted(chain.from_iterable(rows)) == list(range(300))


def test_every_epoch_has_every_chat_once_in_other_company() -> None:
    lengths = np.random.RandomState(0).randint(0, 41, 500)
    epochs = [pack(lengths, 40, 7, epoch) for epoch in range(3)]
    for rows in epochs:
        assert sorted(chain.from_iterable(rows)) == np.flatnonzero(lengths > 1).tolist()
        assert max((lengths[row] - 1).sum() for row in rows) <= 40
    assert len({len(rows) for rows in epochs}) == 1
    assert pack(lengths, 40, 7, 1) == epochs[1]
    company = [{frozenset(row) for row in rows} for rows in (*epochs, pack(lengths, 40, 8, 0))]
    assert all(len(one & other) < 100 for i, one in enumerate(company) for other in company[i + 1 :])
    alone = pack(lengths, 40, 7, 0, packing=False)
    assert sorted(alone) == [[chat] for chat in np.flatnonzero(lengths > 1)] and alone != sorted(alone)


def test_more_than_98_percent_of_the_positions_are_used() -> None:
    """Lengths as those of grade-school problems with their solutions: most from 100 to 400 tokens."""
    lengths = np.random.RandomState(0).lognormal(5.3, 0.4, 7473).astype(np.int64).clip(2, 2049)
    rows = pack(lengths, 2048, 1234, 0)
    assert (lengths - 1).sum() > 0.98 * 2048 * len(rows)


def test_a_row_by_hand(tmp_path: Path) -> None:
    """Chats of 4 and 3 tokens take 3 and 2 positions of 7; 1 and 2 are the user's and the assistant's roles."""
    chats(tmp_path / "d", [[0, 1, 2, 2], [1, 1, 2]])
    samples = ChatSamples(tmp_path / "d", ALL, "train", 7, 10, 0, scalar_loss_mask=0.25)
    assert len(samples) == 10
    for index in (0, 9):
        row = samples[index]
        assert row.tokens.tolist() == [0, 1, 2, 4, 5, 0, 0]
        assert row.labels.tolist() == [1, 2, 3, 5, 6, 0, 0]
        assert row.weights.tolist() == [0.25, 1, 1, 0.25, 1, 0, 0]
        assert row.starts == [3, 5]
    exact = ChatSamples(tmp_path / "d", ALL, "train", 5, 1, 0)[0]
    assert (exact.tokens.tolist(), exact.starts) == ([0, 1, 2, 4, 5], [3])
    assert exact.weights.tolist() == [0, 1, 1, 0, 1]


def test_many_rows_are_their_chats(tmp_path: Path) -> None:
    """Also over the end of an epoch, in any order and more than once; the part does not start with the first chat."""
    roles = some_chats(60, 20)
    documents = chats(tmp_path / "d", roles)
    samples = ChatSamples(tmp_path / "d", [1, 2, 0], "validation", 20, 100, 5, scalar_loss_mask=0.5)
    part, weight_of = range(20, 60), [0.5, 0.5, 1.0, 0.0]
    epochs = [pack(np.array([len(roles[i]) for i in part]), 20, 5, epoch) for epoch in range(2)]
    wanted = [len(epochs[0]) + 3, 0, len(epochs[0]) - 1, len(epochs[0]), 0]
    for index, row in zip(wanted, samples.read(np.array(wanted)), strict=True):
        packed = [part[chat] for chat in (epochs[0] + epochs[1])[index]]
        room = 20 - sum(len(documents[chat]) - 1 for chat in packed)
        assert row.tokens.tolist() == [t for chat in packed for t in documents[chat][:-1]] + [0] * room
        assert row.labels.tolist() == [t for chat in packed for t in documents[chat][1:]] + [0] * room
        assert row.weights.tolist() == [weight_of[r] for chat in packed for r in roles[chat][1:]] + [0] * room
        ends = np.cumsum([len(documents[chat]) - 1 for chat in packed]).tolist()
        assert row.starts == (ends if room else ends[:-1])


def test_batches_by_hand(tmp_path: Path) -> None:
    """Without packing a micro-batch is as long as its longest chat, rounded up; attention knows every border."""
    chats(tmp_path / "d", [[1, 2, 2, 2, 2, 2], [1, 2]])
    samples = ChatSamples(tmp_path / "d", ALL, "train", 8, 4, 0, packing=False)
    rows = {len(samples[i].tokens): samples[i] for i in (0, 1)}
    assert rows[5].labels.tolist() == [1, 2, 3, 4, 5] and rows[1].tokens.tolist() == [6]
    first, second = (len(samples[i].tokens) for i in (0, 1))
    one = Loader(samples, 8, 2, 1, 1, 0, pad_to=2).step(0)  # type: ignore[arg-type]
    assert one.lengths == tuple({5: 6, 1: 2}[length] for length in (first, second))
    parts = {len(tokens): (tokens, bounds, weights) for tokens, bounds, _, weights in one.micro_batches()}
    assert parts[6][0].tolist() == [0, 1, 2, 3, 4, 0] and sorted(set(parts[6][1].tolist())) == [0, 5, 6]
    assert parts[6][2].tolist() == [1, 1, 1, 1, 1, 0]
    assert parts[2][0].tolist() == [6, 0] and sorted(set(parts[2][1].tolist())) == [0, 1, 2]
    both = Loader(samples, 8, 2, 2, 1, 0, pad_to=2).step(0)  # type: ignore[arg-type]
    assert both.lengths == (6,) and both.tokens.shape == (1, 2, 6)
    short, long = (0, 6) if first == 1 else (6, 0)
    expected = {0, 6, 12, short + 1, long + 5}
    assert set(both.cu_seqlens.flatten().tolist()) == expected
    full = Loader(samples, 8, 2, 2, 1, 0).step(0)  # type: ignore[arg-type]
    assert full.lengths == (8,) and full.tokens.shape == (1, 2, 8)


@pytest.mark.parametrize("packing", [True, False])
def test_any_split_gives_the_same_global_batches(packing: bool, tmp_path: Path) -> None:
    documents = chats(tmp_path / "d", some_chats(60, 20))

    def opened(*arguments: object) -> ChatSamples:
        return ChatSamples(*arguments, packing=packing)  # type: ignore[arg-type]

    blend = Blend({tmp_path / "d": 1.0}, ALL, "train", 20, 36, 5, opened)

    def trained(dp: int, micro_batch: int, step: int) -> list[tuple[int, int, float]]:
        loaders = [Loader(blend, 20, 12, micro_batch, dp, rank, pad_to=4) for rank in range(dp)]
        parts = [part for loader in loaders for part in loader.step(step).micro_batches()]
        table = [triple for part in parts for triple in zip(*(part[i].tolist() for i in (0, 2, 3)), strict=True)]
        return [triple for triple in table if triple[1]]

    steps = [trained(1, 1, step) for step in range(3)]
    assert sum(len(step) for step in steps) > 100
    for token, label, _ in chain.from_iterable(steps):
        assert label == token + 1 and any(token in document and label in document for document in documents)
    for dp, micro_batch in ((1, 4), (2, 3), (3, 2), (4, 1), (12, 1)):
        assert [trained(dp, micro_batch, step) for step in range(3)] == steps


def test_text_and_chats_blend(tmp_path: Path) -> None:
    dataset(tmp_path / "text", [30] * 20)
    chats(tmp_path / "chat", some_chats(60, 20), first_token=1000)
    data = {tmp_path / "text": 1.0, tmp_path / "chat": 3.0}
    blend = Blend(data, ALL, "train", 20, 40, 5, open_samples)
    assert [type(samples) for samples in blend.datasets] == [Samples, ChatSamples]
    batch = Loader(blend, 20, 40, 4, 1, 0).step(0)
    is_chat = batch.tokens.flatten(0, 1)[:, 0] >= 1000
    assert is_chat.sum() == 30
    assert (batch.weights.flatten(0, 1)[is_chat].mean() < 0.6) and (batch.weights.flatten(0, 1)[~is_chat].mean() > 0.9)


def test_a_chat_that_is_too_long_is_refused(tmp_path: Path) -> None:
    chats(tmp_path / "d", [[1] * 9, [1] * 12, [1] * 10])
    check_part(tmp_path / "d", ALL, "train", 11)
    with pytest.raises(UserError) as error:
        check_part(tmp_path / "d", ALL, "train", 9)
    assert str(error.value) == (
        f"1 of 3 chats of {tmp_path}/d have more than 10 tokens, the longest 12, and seq_len 9 has no room for them:"
        " raise seq_len, or tokenize with max_length: 9, which splits long chats at turns, or drops them with"
        " over_long: drop"
    )
    with pytest.raises(UserError, match="the longest 12"):
        ChatSamples(tmp_path / "d", ALL, "train", 9, 1, 0)


def test_chats_of_one_token_are_refused(tmp_path: Path) -> None:
    chats(tmp_path / "d", [[2], [2]])
    with pytest.raises(UserError, match=r"the 2 chats of .*/d have a token each: nothing can be predicted"):
        check_part(tmp_path / "d", ALL, "train", 9)


def test_roles_of_other_documents_are_refused(tmp_path: Path) -> None:
    chats(tmp_path / "d", [[1] * 9, [2] * 12])
    dataset(tmp_path / "d", [10, 11])
    with pytest.raises(UserError, match=r"d\.roles has 2 documents of 21 tokens, .*/d has 2 of 21: not one corpus's"):
        check_part(tmp_path / "d", ALL, "train", 20)


def test_megatron_llms_roles_are_found(tmp_path: Path) -> None:
    """NAME-text and NAME-role, of its tools/preprocess_instruct_data.py: uint16 roles."""
    dataset(tmp_path / "d-text", [3])
    with Writer(tmp_path / "d-role", np.dtype(np.uint16)) as writer:
        writer.add(np.array([0, 1, 2]), np.array([3]))
    samples = open_samples(tmp_path / "d-text", ALL, "train", 4, 1, 0)
    assert samples[0].weights.tolist() == [0, 1, 0, 0]  # type: ignore[union-attr]
