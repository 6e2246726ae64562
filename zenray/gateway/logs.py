"""Logs of the gateway: one JSON object a line on stderr. Nothing that a client wrote, and no key, is ever in them.

Lines of answered requests are gathered and written together, some times a second; everything else is written at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time

import orjson

_FLUSH_INTERVAL_S = 0.2
_FLUSH_BYTES = 1 << 16
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """`extra` fields become fields of the object."""

    def __init__(self, gateway_id: str) -> None:
        super().__init__()
        self._gateway_id = gateway_id

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": record.created,
            "level": record.levelname.lower(),
            "gateway_id": self._gateway_id,
            "event": record.getMessage(),
        }
        line |= {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def log_to_stderr(gateway_id: str) -> None:
    """Send all logging of this process to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(gateway_id))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class RequestLog:
    """The lines of answered requests."""

    def __init__(self, gateway_id: str, descriptor: int = 2) -> None:
        self._gateway_id = gateway_id
        self._descriptor = descriptor
        self._lines: list[bytes] = []
        self._size_bytes = 0
        self._scheduled = False

    def write(self, fields: dict[str, object]) -> None:
        """Add one line; it is on stderr within a fraction of a second."""
        line = orjson.dumps(
            {"at": time.time(), "level": "info", "gateway_id": self._gateway_id, "event": "request", **fields},
            option=orjson.OPT_APPEND_NEWLINE,
        )
        self._lines.append(line)
        self._size_bytes += len(line)
        if self._size_bytes > _FLUSH_BYTES:
            self.flush()
        elif not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_later(_FLUSH_INTERVAL_S, self.flush)

    def flush(self) -> None:
        self._scheduled = False
        lines, self._lines, self._size_bytes = self._lines, [], 0
        if lines:
            try:
                os.write(self._descriptor, b"".join(lines))
            except OSError:
                pass  # nobody reads stderr any more; requests matter more than their log
