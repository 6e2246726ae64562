"""Where each prompt is at home: one replica for a beginning, on which all processes of a gateway agree.

Every process learns only from the requests that the kernel deals to it. Without a word between them each would choose
its own replica for the same system prompt, and every replica's cache would fill with all of them. The word is a table
in memory that they share: two 32-bit marks in one 64-bit store, of the prompt's beginning and of its replica. Beside
it stands when the prompt was last asked for, so that each replica's homes can be counted without those that nobody
asks for any more. What is overwritten by another prompt's home, or lost when two processes write at once, costs a
cache miss or a wrong count for two minutes, and nothing else.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Sequence
from functools import lru_cache

from zenray.spec.edge import Endpoint as Replica

SLOTS = 1 << 16
SPAN_S = 60.0  # homes asked for in this span of the clock or the one before are counted
_COUNTS = 1 << 10
_SPANS = 4  # of which counts are kept: two are in use, and one that has just begun overwrites none of them
_MASK = (1 << 32) - 1


class Homes:
    """Make it before the processes are forked. Times are seconds of the clock that all of them share."""

    def __init__(self, slots: int = SLOTS) -> None:
        self._slots = slots
        self._words = memoryview(mmap.mmap(-1, 8 * (2 * slots + _SPANS * _COUNTS))).cast("Q")

    def find(self, key: int, replicas: Sequence[Replica]) -> str | None:
        """The id of that one of `replicas` at which `key` is at home; None: it has none, or one that is gone."""
        word = self._words[key % self._slots]
        if not word or word >> 32 != key >> 32:
            return None
        mark = word & _MASK
        return next((one.replica_id for one in replicas if _mark(one.replica_id) == mark), None)

    def settle(self, key: int, replica_id: str, now_s: float) -> None:
        """`key` is asked for now, and at home there from now on."""
        index, mark, span = key % self._slots, _mark(replica_id), _span(now_s)
        words, word = self._words, key >> 32 << 32 | mark
        before, stamp = words[index], words[self._slots + index]
        if before != word:
            words[index] = word
        if stamp == span and before & _MASK == mark:
            return
        if stamp:
            self._count(stamp, before & _MASK, -1)
        words[self._slots + index] = span
        self._count(span, mark, 1)

    def held(self, replica_id: str, now_s: float) -> int:
        """About how many prompts are at home there that were asked for within the last minute or two."""
        mark, span = _mark(replica_id), _span(now_s)
        return sum(
            word & _MASK for one in (span, span - 1) if (word := self._words[self._place(one, mark)]) >> 32 == one
        )

    def _count(self, span: int, mark: int, change: int) -> None:
        place = self._place(span, mark)
        word = self._words[place]
        if word >> 32 == span:
            self._words[place] = span << 32 | max(0, (word & _MASK) + change)
        elif change > 0:
            self._words[place] = span << 32 | change

    def _place(self, span: int, mark: int) -> int:
        return 2 * self._slots + span % _SPANS * _COUNTS + mark % _COUNTS


@lru_cache(maxsize=4096)
def _mark(replica_id: str) -> int:
    return zlib.crc32(replica_id.encode()) or 1


def _span(now_s: float) -> int:
    return int(now_s / SPAN_S) + 1 & _MASK
