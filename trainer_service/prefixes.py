"""Which replica has read which prefix, as far as its callers know."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

_BLOCK = 16  # tokens: as much as engines cache at once
_KNOWN = 1 << 16  # blocks that are remembered


class Prefixes:
    """Remembers for each run of tokens at a prompt's begin who was asked for it last. Not safe across threads."""

    def __init__(self) -> None:
        self._readers: OrderedDict[int, set[int]] = (
            OrderedDict()
        )  # by the hash of all tokens up to a block's end

    def shared(self, tokens: Sequence[int]) -> dict[int, int]:
        """For each reader, how many of the prompt's blocks from the begin on it was asked for."""
        found: dict[int, int] = {}
        readers: set[int] | None = None
        for count, key in enumerate(_keys(tokens), 1):
            here = self._readers.get(key, set())
            readers = set(here) if readers is None else readers & here
            if not readers:
                break
            found |= dict.fromkeys(readers, count)
        return found

    def add(self, tokens: Sequence[int], reader: int) -> None:
        """`reader` is asked for the prompt."""
        for key in _keys(tokens):
            self._readers.setdefault(key, set()).add(reader)
            self._readers.move_to_end(key)
        while len(self._readers) > _KNOWN:
            self._readers.popitem(last=False)

    def forget(self, reader: int) -> None:
        """It has lost what it read."""
        for readers in self._readers.values():
            readers.discard(reader)


def _keys(tokens: Sequence[int]) -> Iterator[int]:
    key = 0
    for start in range(0, len(tokens), _BLOCK):
        key = hash((key, tuple(tokens[start : start + _BLOCK])))
        yield key
