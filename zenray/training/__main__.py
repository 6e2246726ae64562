"""`python -m zenray.training SPEC --store URI --work-dir DIR`: one training job, as `zenray run` starts it."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
from pathlib import Path

from zenray.spec.errors import InvalidDocument, ZenrayError
from zenray.spec.jobs import load_job
from zenray.spec.platform import StorageSettings
from zenray.spec.training import DistillJob, PretrainJob
from zenray.storage.progress import transfer_bar

# Read by Ray when it is imported. It listens on loopback alone only where it takes clusters to be unsupported, and asks
# for a token only where there is one (see zenray/cluster/head.py); a run on one machine needs nobody from outside.
RAY_ON_THIS_MACHINE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when the version is published; 1 with the error on stderr."""
    parser = argparse.ArgumentParser(prog="python -m zenray.training", description=__doc__)
    parser.add_argument("spec", type=Path, help="a job file of kind pretrain or distill")
    parser.add_argument("--store", required=True, help="file:/absolute/path or s3://BUCKET/PREFIX")
    parser.add_argument("--endpoint-url", help="for S3 servers other than Amazon's")
    parser.add_argument("--work-dir", type=Path, required=True, help="for downloads, tokens and events")
    options = parser.parse_args(arguments)
    if "RAY_ADDRESS" not in os.environ:
        os.environ |= RAY_ON_THIS_MACHINE | {"RAY_AUTH_TOKEN": secrets.token_urlsafe(32)}
    for chatty in ("torchao", "torch.utils._pytree"):  # said at import wherever their GPU kernels cannot be loaded
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from zenray.training.runner import run  # imports Ray and torch

    try:
        job = load_job(options.spec)
        if not isinstance(job, PretrainJob | DistillJob):
            raise InvalidDocument(f"{options.spec} is no training job.", hint="Its kind must be pretrain or distill.")
        options.work_dir.mkdir(parents=True, exist_ok=True)
        with transfer_bar() as progress:
            storage = StorageSettings(uri=options.store, endpoint_url=options.endpoint_url)
            made = run(job, storage, options.work_dir, progress=progress)
    except ZenrayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"published {made.ref} ({made.size_bytes / 1e6:,.0f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
