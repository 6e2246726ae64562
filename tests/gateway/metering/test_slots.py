"""Slots: what was stored is there after the process is gone, whole, and only for the request that owned it."""

from __future__ import annotations

import mmap
import os
import resource
import signal
import time
from collections import deque
from pathlib import Path

import pytest

from tests.gateway.metering.conftest import open_charge
from zenray.gateway.metering import Meter
from zenray.gateway.metering.slots import OUTPUT_BITS, OUTPUT_MASK, SlotFile, StoredSlots, counter_index, total
from zenray.spec.clock import FakeClock
from zenray.spec.usage import Outcome


def test_a_counter_is_believed_only_for_its_own_generation(tmp_path: Path) -> None:
    slots = SlotFile(tmp_path / "slots", 4)
    slots.claim(3, 7)
    slots.words[counter_index(3)] = 11 << OUTPUT_BITS | 5
    slots.close()
    stored = StoredSlots(tmp_path / "slots")
    assert stored.counter(3, 7) == 11 << OUTPUT_BITS | 5
    assert stored.counter(3, 6) == 0
    assert stored.counter(2, 7) == 0
    assert stored.counter(400, 7) == 0


def test_claiming_a_slot_zeroes_what_its_last_owner_counted(tmp_path: Path) -> None:
    slots = SlotFile(tmp_path / "slots", 1)
    slots.claim(0, 1)
    slots.words[counter_index(0)] = 99
    slots.claim(0, 2)
    slots.close()
    assert StoredSlots(tmp_path / "slots").counter(0, 2) == 0


@pytest.mark.parametrize("content", [None, b"", b"zen", bytes(160)])
def test_a_missing_or_foreign_file_has_no_counts(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "slots").write_bytes(content)
    assert StoredSlots(tmp_path / "slots").counter(0, 0) == 0


def test_choices_of_one_prompt_share_its_input() -> None:
    def counter(input_tokens: int, output_tokens: int) -> int:
        return input_tokens << OUTPUT_BITS | output_tokens

    assert total([counter(10, 3), counter(10, 4), counter(0, 0)], prompts=1) == (10, 7)
    assert total([counter(10, 3), counter(10, 4), counter(20, 0), counter(0, 0)], prompts=2) == (30, 7)
    assert total([OUTPUT_MASK << OUTPUT_BITS | OUTPUT_MASK], prompts=1) == (OUTPUT_MASK, OUTPUT_MASK)


def test_without_room_on_the_disk_there_is_an_error_and_no_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError):
            SlotFile(tmp_path / "slots", 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "slots").exists()


def test_a_count_is_never_seen_torn(tmp_path: Path) -> None:
    """A child counts as many input as output tokens; whoever reads its slot, at any time, must see equal halves."""
    child = os.fork()
    if child == 0:
        try:
            count_for_ever(tmp_path / "wal")
        finally:
            os._exit(1)
    try:
        until_s = time.monotonic() + 20
        while not any(p.stat().st_size for p in (tmp_path / "wal").glob("slots-*")) and time.monotonic() < until_s:
            time.sleep(0.001)
        (path,) = (tmp_path / "wal").glob("slots-*")
        with open(path, "rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast("Q")
        seen = set()
        while len(seen) < 5000 and time.monotonic() < until_s:
            word = view[counter_index(0)]
            assert word >> OUTPUT_BITS == word & OUTPUT_MASK
            seen.add(word)
        assert len(seen) == 5000
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def count_for_ever(folder: Path) -> None:
    meter = Meter(folder, "gw-1", max_streams=1, max_wal_bytes=1 << 30, clock=FakeClock())
    meter._free = deque([0])  # one slot only, so that the reader knows where to look
    while True:
        charge = open_charge(meter)
        for tokens in range(0, OUTPUT_MASK, 0x010203):
            charge.count(0, tokens, tokens)
        charge.close(Outcome.CLIENT_GONE)
        meter.acknowledge([charge.billing_key])
        meter.commit()
