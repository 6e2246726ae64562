"""Runs the import of a checkpoint in a process of its own: torch stays out of this one, and memory is given back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

import zenray
from zenray.spec.errors import InvalidDocument, InvalidValue, NotFound, StorageUnavailable, ZenrayError
from zenray.storage.base import Progress

_ERRORS: dict[str, type[ZenrayError]] = {
    error.code: error for error in (InvalidDocument, InvalidValue, NotFound, StorageUnavailable)
}


class ConversionReport(BaseModel):
    """What the process says of the checkpoint that it made."""

    model_config = ConfigDict(frozen=True)

    architecture: str
    model_type: str
    dtype: str
    parameters: int
    tensors: int
    context_tokens: int | None = None
    template_overhead_tokens: int | None = None
    notes: tuple[str, ...] = ()


def convert(
    source: Path, target: Path, *, dtype: str, format: str, progress: Progress | None = None
) -> ConversionReport:
    """Make `target` a complete Hugging Face folder out of `source`. Blocks; progress phase "convert".

    The process ends when this one does, however that happens. Raises what it says is wrong (InvalidDocument, NotFound,
    InvalidValue, StorageUnavailable), or ZenrayError with the end of its output when it broke.
    """
    command = [sys.executable, "-m", "zenray.model.checkpoints", str(source), str(target)]
    command += ["--dtype", dtype, "--format", format, "--until-stdin-closes"]
    packages = str(Path(zenray.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))}
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                answer = _parse(line) or answer
                if progress and "done_bytes" in answer:
                    progress("convert", answer["done_bytes"], answer["total_bytes"])
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()
        if code == 0 and "report" in answer:
            return ConversionReport.model_validate(answer["report"])
        if "error" in answer:
            error = answer["error"]
            raise _ERRORS.get(error["code"], ZenrayError)(error["message"], hint=error["hint"])
        stderr.seek(0)
        raise _broke(source, code, stderr.read().decode(errors="replace"))


def _parse(line: str) -> dict[str, Any] | None:
    """A line of the protocol; None for what libraries print."""
    try:
        data = json.loads(line)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def _broke(source: Path, code: int, stderr: str) -> ZenrayError:
    if code == -signal.SIGKILL:
        return ZenrayError(
            f"The import of {source} was killed.", hint="Most likely the machine ran out of memory: use a larger one."
        )
    last = [line for line in stderr.splitlines() if line.strip()][-5:]
    return ZenrayError(f"The import of {source} broke with exit code {code}: {' '.join(last)}")
