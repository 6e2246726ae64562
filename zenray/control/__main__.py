"""`python -m zenray.control CONFIG`: serves control until SIGTERM or SIGINT, then ends within five seconds."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from types import FrameType

import uvicorn
from sqlalchemy.exc import DBAPIError

from zenray.control.app import Control, build_control
from zenray.control.config import ControlConfig
from zenray.spec.documents import load_document
from zenray.spec.errors import ZenrayError

GRACE_S = 3


class _Server(uvicorn.Server):
    """Uvicorn, telling the long polls to answer as soon as a signal arrives instead of waiting for them."""

    def __init__(self, config: uvicorn.Config, control: Control) -> None:
        super().__init__(config)
        self._control = control

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._control.feed.close()


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m zenray.control CONFIG", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every question to Ray
    try:
        config = load_document(Path(arguments[0]), ControlConfig)
        control = build_control(config)
    except ZenrayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DBAPIError as error:  # its own text would quote the statement
        print(f"error: the database cannot be used: {error.orig}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    server = _Server(
        uvicorn.Config(
            control.app,
            host=config.host,
            port=config.port,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=GRACE_S,
        ),
        control,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises the signal once more when it is done: end with 0
    server.run()
    control.database.close()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
