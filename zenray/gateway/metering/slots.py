"""Running token counts in a memory-mapped file: one aligned 64-bit store a count, no system call, safe from kill -9.

    header: 8 words (magic, number of slots, 6 unused)
    slot i: counter (input tokens << 32 | output tokens), generation (sequence number of the request that owns it)

The pages belong to the kernel, so they outlive the process. A counter is believed only where the slot's generation is
the one that the request's open record names. Each boot has a file of its own: generations never meet across boots.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

MAGIC = int.from_bytes(b"zenslot1", "little")
HEADER_WORDS = 8
WORDS_PER_SLOT = 2
WORD_BYTES = 8
OUTPUT_BITS = 32
OUTPUT_MASK = (1 << OUTPUT_BITS) - 1


def counter_index(slot: int) -> int:
    """Where the slot's counter stands among the file's words; its generation is the next word."""
    return HEADER_WORDS + WORDS_PER_SLOT * slot


def total(counters: Sequence[int], prompts: int) -> tuple[int, int]:
    """(input, output) tokens of a request from its choices' counters, in the engine's order: prompt by prompt.

    Every choice of a prompt reports that prompt's tokens; they were read once, so they count once.
    """
    per_prompt = len(counters) // prompts
    prompts_read = (counters[first : first + per_prompt] for first in range(0, len(counters), per_prompt))
    input_tokens = sum(max(counter >> OUTPUT_BITS for counter in choices) for choices in prompts_read)
    return input_tokens, sum(counter & OUTPUT_MASK for counter in counters)


class SlotFile:
    """The slots of the running boot. `words` is the file as 64-bit words, for the hot path."""

    def __init__(self, path: Path, slots: int) -> None:
        size_bytes = WORD_BYTES * (HEADER_WORDS + WORDS_PER_SLOT * slots)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Every block exists before it is mapped: on a full disk a store into a hole kills the process (SIGBUS).
            os.posix_fallocate(self._fd, 0, size_bytes)
            os.pwrite(self._fd, bytes(size_bytes), 0)
            self._map = mmap.mmap(self._fd, size_bytes)
        except OSError:
            os.close(self._fd)
            path.unlink(missing_ok=True)
            raise
        # A native "Q" item of a memoryview is stored by one 8-byte move; `struct` with "<" would store byte by byte.
        self.words = memoryview(self._map).cast("Q")
        self.words[0] = MAGIC
        self.words[1] = slots

    def claim(self, slot: int, generation: int) -> None:
        """Zero the counter, then make the slot this generation's."""
        index = HEADER_WORDS + WORDS_PER_SLOT * slot
        self.words[index] = 0
        self.words[index + 1] = generation

    def sync(self) -> None:
        """Write the counts to the disk (blocks)."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Unmap; a store through `words` raises ValueError from now on."""
        self.words.release()
        self._map.close()
        os.close(self._fd)


class StoredSlots:
    """The slot file of an earlier boot, read once. A missing or foreign file has no counts."""

    def __init__(self, path: Path) -> None:
        self._words = array("Q")
        if path.exists():
            data = path.read_bytes()
            self._words.frombytes(data[: len(data) - len(data) % WORD_BYTES])
        if not self._words or self._words[0] != MAGIC:
            self._words = array("Q")

    def counter(self, slot: int, generation: int) -> int:
        """What the slot counted for this generation; 0 when it is not this generation's (any more, or yet)."""
        index = counter_index(slot)
        if index + 1 < len(self._words) and self._words[index + 1] == generation:
            return self._words[index]
        return 0
