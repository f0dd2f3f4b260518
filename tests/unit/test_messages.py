"""Memory of messages: apart where that is little, used again where it is much, and none over another's words."""

from __future__ import annotations

import itertools

import pytest
import torch

from weight_transfer import messages as module
from weight_transfer.messages import SLOTS, messages
from weight_transfer.tiles import ENTRY, HEADER

CPU = torch.device("cpu")
WORDS = [100, 7, 64, 33, 260, 5]


def ranges(each: tuple[torch.Tensor, ...]) -> list[tuple[int, int]]:
    return sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in each)


def assert_apart(each: tuple[torch.Tensor, ...]) -> None:
    spans = ranges(each)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_each_has_its_own_words_at_aligned_places() -> None:
    room, memory = messages(WORDS, CPU)
    assert room.apart
    assert [len(one) for one in room.each] == WORDS
    assert_apart(room.each)
    assert all((one.data_ptr() - memory.data_ptr()) % 128 == 0 for one in room.each)


@pytest.mark.parametrize("most", [0, ENTRY * 288 * 4])
def test_memory_is_used_again_after_as_many_as_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(module, "ALL_BYTES", most)
    words = [260] * 6
    room, memory = messages(words, CPU)
    assert (room.slots, room.apart) == ((3 if most == 0 else 4), False)
    assert memory.nbytes == ENTRY * 288 * room.slots
    for k in range(len(words)):
        assert_apart(room.each[k : k + room.slots])
        if k >= room.slots:
            assert room.each[k].data_ptr() == room.each[k - room.slots].data_ptr()


def test_a_few_are_always_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALL_BYTES", 0)
    assert messages(WORDS[:SLOTS], CPU)[0].apart
    assert messages(WORDS, CPU, kept=True)[0].apart


def test_headers_are_cleared_and_counted() -> None:
    room, memory = messages(WORDS, CPU)
    memory.fill_(-1)
    room.clear()
    assert all(one[:HEADER].eq(0).all() and one[HEADER:].eq(-1).all() for one in room.each)
    for k, one in enumerate(room.each):
        one[0] = k - 1
    assert room.counts().tolist() == [0xFFFFFFFF, 0, 1, 2, 3, 4], "as unsigned numbers"


def test_memory_is_kept_where_it_is_enough() -> None:
    _, memory = messages(WORDS, CPU)
    assert messages(WORDS[:3], CPU, memory)[1] is memory
    assert messages([*WORDS, 1], CPU, memory)[1] is not memory


def test_of_no_window() -> None:
    room, _ = messages([], CPU)
    room.clear()
    assert room.apart
    assert room.counts().tolist() == []
