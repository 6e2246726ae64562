"""`python -m zenray.model.checkpoints SOURCE DEST [--dtype bfloat16] [--format safetensors]`.

Writes JSON lines to stdout: `{"done_bytes": …, "total_bytes": …}` as it goes, then one `{"report": {…}}` (exit code 0)
or one `{"error": {"code": …, "message": …, "hint": …}}` (exit code 1).
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import sys
import threading
from pathlib import Path

from zenray.spec.errors import StorageUnavailable, ZenrayError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m zenray.model.checkpoints", description="Import a checkpoint.")
    parser.add_argument("source", type=Path, help="a folder with safetensors, or a GGUF file")
    parser.add_argument("dest", type=Path, help="the folder to make")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    parser.add_argument("--format", default="safetensors", help="awq-int4 or gptq-int8: packed weights, kept so")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end when the process that started this does")
    arguments = parser.parse_args()
    if arguments.until_stdin_closes:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on disk: nothing may be looked up
    try:
        from transformers.utils import logging

        from zenray.model.checkpoints.convert import convert

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        report = convert(
            arguments.source, arguments.dest, dtype=arguments.dtype, format=arguments.format, on_converted=_tell
        )
    except ZenrayError as error:
        return _fail(error)
    except OSError as error:
        return _fail(StorageUnavailable(f"{error.filename or arguments.dest}: {error.strerror or error}."))
    except Exception as error:
        if os.strerror(errno.ENOSPC) not in str(error):  # safetensors reports a full disk in an error of its own
            raise
        return _fail(StorageUnavailable(f"{arguments.dest}: the disk is full: {error}.", hint="Free some space."))
    _write({"report": dataclasses.asdict(report)})
    return 0


def _end_with_stdin() -> None:
    while os.read(0, 4096):  # not sys.stdin: a thread that holds its lock cannot be left behind at exit
        pass
    os._exit(2)


def _tell(done_bytes: int, total_bytes: int) -> None:
    _write({"done_bytes": done_bytes, "total_bytes": total_bytes})


def _fail(error: ZenrayError) -> int:
    _write({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
    return 1


def _write(data: object) -> None:
    sys.stdout.write(json.dumps(data) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
