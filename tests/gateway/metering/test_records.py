"""The log's framing: whole records come back as they were, torn or damaged ones never become anything else."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from zenray.gateway.metering.records import HEADER, Damage, frame, read_records

PAYLOADS = [
    b'{"t":"open","event":{"billing_key":"a:b:1"}}',
    b'{"t":"close","event":{"note":"a quoted {\\"t\\":\\" and \xc3\xa9"}}',
    b'{"t":"close","event":{"billing_key":"a:b:2"}}',
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def records_in(path: Path) -> tuple[list[object], list[Damage]]:
    found = list(read_records(path))
    return [r for r in found if not isinstance(r, Damage)], [r for r in found if isinstance(r, Damage)]


def test_records_come_back_in_order(path: Path) -> None:
    path.write_bytes(b"".join(map(frame, PAYLOADS)))
    assert records_in(path) == ([orjson.loads(payload) for payload in PAYLOADS], [])


def test_a_log_torn_at_any_byte_gives_the_whole_records_before_it(path: Path) -> None:
    log = b"".join(map(frame, PAYLOADS))
    ends = [sum(len(frame(payload)) for payload in PAYLOADS[: count + 1]) for count in range(len(PAYLOADS))]
    for length in range(len(log) + 1):
        path.write_bytes(log[:length])
        whole = sum(end <= length for end in ends)
        records, damage = records_in(path)
        assert records == [orjson.loads(payload) for payload in PAYLOADS[:whole]]
        torn = length - (ends[whole - 1] if whole else 0)
        assert damage == ([Damage(length - torn, torn, is_tail=True)] if torn else [])


@pytest.mark.parametrize("tail", [bytes(4096), b"\xff" * 100, frame(PAYLOADS[0])[:-1]])
def test_a_tail_that_is_no_record_is_cut(path: Path, tail: bytes) -> None:
    log = frame(PAYLOADS[0])
    path.write_bytes(log + tail)
    assert records_in(path) == ([orjson.loads(PAYLOADS[0])], [Damage(len(log), len(tail), is_tail=True)])


def test_one_damaged_byte_costs_at_most_its_own_record(path: Path) -> None:
    log = b"".join(map(frame, PAYLOADS))
    starts = [sum(len(frame(payload)) for payload in PAYLOADS[:count]) for count in range(len(PAYLOADS) + 1)]
    for offset in range(len(log)):
        for mask in (0x01, 0x80, 0xFF):
            damaged = bytearray(log)
            damaged[offset] ^= mask
            path.write_bytes(damaged)
            hit = next(i for i in range(len(PAYLOADS)) if starts[i] <= offset < starts[i + 1])
            records, damage = records_in(path)
            assert records == [orjson.loads(payload) for i, payload in enumerate(PAYLOADS) if i != hit]
            assert [d.offset for d in damage] == [starts[hit]]
            assert damage[0].is_tail == (hit == len(PAYLOADS) - 1)


def test_a_length_beyond_the_file_or_the_bound_is_no_record(path: Path) -> None:
    for length in (0, 1 << 21, 0xFFFFFFFF):
        path.write_bytes(HEADER.pack(length, 0) + b"x" * 50)
        assert records_in(path) == ([], [Damage(0, 58, is_tail=True)])
