"""Memory of messages: apart where that is little, used again where it is much, and none over another's words."""

from __future__ import annotations

import itertools

import pytest
import torch

from weight_transfer import messages as module
from weight_transfer.messages import SLOTS, MessageMemory, Messages
from weight_transfer.tiles import ENTRY, HEADER

CPU = torch.device("cpu")
WORDS = [100, 7, 64, 33, 260, 5]


def of(words: list[int], **how: bool) -> Messages:
    return MessageMemory(CPU).of(words, **how)


def ranges(each: tuple[torch.Tensor, ...]) -> list[tuple[int, int]]:
    return sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in each)


def assert_apart(each: tuple[torch.Tensor, ...]) -> None:
    spans = ranges(each)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_each_has_its_own_words_at_aligned_places() -> None:
    found = of(WORDS)
    assert found.apart
    assert [len(one) for one in found.each] == WORDS
    assert_apart(found.each)
    assert all((one.data_ptr() - found.each[0].data_ptr()) % 128 == 0 for one in found.each)


@pytest.mark.parametrize("most", [0, ENTRY * 288 * 4])
def test_memory_is_used_again_after_as_many_as_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(module, "ALL_BYTES", most)
    words = [260] * 6
    found = of(words)
    assert (found.slots, found.apart) == ((3 if most == 0 else 4), False)
    for k in range(len(words)):
        assert_apart(found.each[k : k + found.slots])
        if k >= found.slots:
            assert found.each[k].data_ptr() == found.each[k - found.slots].data_ptr()


def test_a_large_one_among_small_ones_is_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALL_BYTES", 0)
    found = of([3200, 32, 32, 32, 32, 32])
    assert found.apart, "thrice as much as the large one would be more than all"
    assert found.each[0].untyped_storage().nbytes() == ENTRY * (3200 + 5 * 32)


def test_a_few_are_always_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALL_BYTES", 0)
    assert of(WORDS[:SLOTS]).apart
    assert of([260] * 6, kept=True).apart


def test_headers_are_cleared_and_counted() -> None:
    found = of(WORDS)
    for one in found.each:
        one.fill_(-1)
    found.clear()
    assert all(one[:HEADER].eq(0).all() and one[HEADER:].eq(-1).all() for one in found.each)
    for k, one in enumerate(found.each):
        one[0] = k - 1
    assert found.counts().tolist() == [0xFFFFFFFF, 0, 1, 2, 3, 4], "as unsigned numbers"


def test_memory_is_kept_where_it_is_enough() -> None:
    memory = MessageMemory(CPU)
    before = memory.of(WORDS).each[0].data_ptr()
    assert memory.of(WORDS[:3]).each[0].data_ptr() == before
    assert memory.of([*WORDS, 1]).each[0].untyped_storage().nbytes() == ENTRY * 32 * 20
    memory.drop()
    assert [len(one) for one in memory.of([5]).each] == [5]


def test_of_no_window() -> None:
    found = of([])
    found.clear()
    assert found.apart
    assert found.counts().tolist() == []
