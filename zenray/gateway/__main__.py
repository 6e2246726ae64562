"""`python -m zenray.gateway CONFIG.json`"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from zenray.gateway.config import GatewayConfig
from zenray.spec.documents import load_document
from zenray.spec.errors import ZenrayError


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m zenray.gateway CONFIG.json", file=sys.stderr)
        return 2
    try:
        config = load_document(Path(arguments[0]), GatewayConfig)
        # Before anything imports prometheus_client, which decides at import how it counts.
        if config.processes > 1:
            from zenray.gateway.shared_metrics import share_metrics

            share_metrics(config.state_dir / "metrics")
        from zenray.gateway.server import run

        # What is loaded now lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        return run(config)
    except ZenrayError as error:
        print(f"zenray.gateway: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
