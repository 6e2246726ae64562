"""Where each prompt is at home: one replica for a beginning, on which all processes of a gateway agree.

Every process learns only from the requests that the kernel deals to it. Without a word between them each would choose
its own replica for the same system prompt, and every replica's cache would fill with all of them. The word is a table
in memory that they share: two 32-bit marks in one 64-bit store, of the prompt's beginning and of its replica. What is
overwritten by another prompt's home, or lost when two processes write at once, costs a cache miss and nothing else.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Sequence

from zenray.spec.edge import Endpoint as Replica

SLOTS = 1 << 16
_COUNTS = 1 << 10
_MASK = (1 << 32) - 1


class Homes:
    """Make it before the processes are forked."""

    def __init__(self, slots: int = SLOTS) -> None:
        self._slots = slots
        self._words = memoryview(mmap.mmap(-1, 8 * (slots + _COUNTS))).cast("Q")

    def find(self, key: int, replicas: Sequence[Replica]) -> str | None:
        """The id of that one of `replicas` at which `key` is at home; None: it has none, or one that is gone."""
        word = self._words[key % self._slots]
        if not word or word >> 32 != key >> 32:
            return None
        mark = word & _MASK
        return next((one.replica_id for one in replicas if _mark(one.replica_id) == mark), None)

    def settle(self, key: int, replica_id: str) -> None:
        """From now on `key` is at home there."""
        index, mark = key % self._slots, _mark(replica_id)
        before = self._words[index]
        if before and before & _MASK == mark:
            self._words[index] = key >> 32 << 32 | mark
            return
        if before:
            place = self._slots + (before & _MASK) % _COUNTS
            self._words[place] = max(0, self._words[place] - 1)
        self._words[index] = key >> 32 << 32 | mark
        self._words[self._slots + mark % _COUNTS] += 1

    def held(self, replica_id: str) -> int:
        """How many prompts are at home there, about."""
        return self._words[self._slots + _mark(replica_id) % _COUNTS]


def _mark(replica_id: str) -> int:
    return zlib.crc32(replica_id.encode()) or 1
