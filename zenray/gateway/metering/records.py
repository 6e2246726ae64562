"""Records of the usage log: how they are framed, written as JSON and read back past torn or damaged bytes.

    record  = length (u32 LE) + crc32 of the payload (u32 LE) + payload (JSON)
    payload = {"t": "open",  "seq": 7, "slots": [3, 4], "prompts": 1, "reserve": 1200, "event": {…without an end…}}
            | {"t": "close", "event": {…a whole UsageEvent…}}

A close stands for itself: it is billed even when its open can no longer be read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import orjson

HEADER = struct.Struct("<II")
MAX_RECORD_BYTES = 1 << 20
RECORD_START = b'{"t":"'


def frame(payload: bytes) -> bytes:
    """The payload with its header: what one write(2) puts into the log."""
    return HEADER.pack(len(payload), crc32(payload)) + payload


@dataclass(frozen=True)
class Damage:
    """Bytes that are no record: a torn tail (the usual end of a power cut or a full disk), or rot before the tail."""

    offset: int
    length_bytes: int
    is_tail: bool


def read_records(path: Path) -> Iterator[dict[str, Any] | Damage]:
    """The records of one segment, in order; Damage stands where bytes are not a record. Reads the file whole.

    Damaged bytes are stepped over up to the next good record; when none follows, all from there on is the tail.
    """
    data = path.read_bytes()
    offset = 0
    while offset < len(data):
        payload = _payload_at(data, offset)
        if payload is not None:
            yield orjson.loads(payload)
            offset += HEADER.size + len(payload)
            continue
        following = _next_record(data, offset)
        if following is None:
            yield Damage(offset, len(data) - offset, is_tail=True)
            return
        yield Damage(offset, following - offset, is_tail=False)
        offset = following


def _payload_at(data: bytes, offset: int) -> bytes | None:
    start = offset + HEADER.size
    if start > len(data):
        return None
    length, checksum = HEADER.unpack_from(data, offset)
    if not 0 < length <= MAX_RECORD_BYTES or start + length > len(data):
        return None
    payload = data[start : start + length]
    return payload if crc32(payload) == checksum else None


def _next_record(data: bytes, offset: int) -> int | None:
    """Where the next good record starts after a damaged one. No string inside JSON can hold RECORD_START unescaped."""
    start = data.find(RECORD_START, offset + 1)
    while start != -1:
        if start - HEADER.size > offset and _payload_at(data, start - HEADER.size) is not None:
            return start - HEADER.size
        start = data.find(RECORD_START, start + 1)
    return None
