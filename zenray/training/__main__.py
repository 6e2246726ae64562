"""`python -m zenray.training`: one job of any kind, as `zenray run` and control start it."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
from pathlib import Path

from zenray.spec.errors import ZenrayError
from zenray.spec.job_events import Ended
from zenray.spec.jobs import job_id, load_job
from zenray.spec.platform import StorageSettings
from zenray.storage.job_record import read_recorded_job
from zenray.storage.opening import open_store
from zenray.storage.pinning import pin
from zenray.training.events import EventPlace, EventStream, narrated
from zenray.training.phases import carry_out

# Read by Ray when it is imported. It listens on loopback alone only where it takes clusters to be unsupported, and asks
# for a token only where there is one (see zenray/cluster/head.py); a run on one machine needs nobody from outside.
RAY_ON_THIS_MACHINE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when all is published; 1 with the error on stderr, and as the last of the job's events."""
    parser = argparse.ArgumentParser(prog="python -m zenray.training", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("spec", type=Path, nargs="?", help="a job file")
    which.add_argument("--job", help="the id of a job that is recorded in the store")
    parser.add_argument("--store", required=True, help="file:/absolute/path or s3://BUCKET/PREFIX")
    parser.add_argument("--endpoint-url", help="for S3 servers other than Amazon's")
    parser.add_argument("--work-dir", type=Path, required=True, help="for downloads, tokens and what is being made")
    options = parser.parse_args(arguments)
    if "RAY_ADDRESS" not in os.environ:
        os.environ |= RAY_ON_THIS_MACHINE | {"RAY_AUTH_TOKEN": secrets.token_urlsafe(32)}
    for chatty in ("torchao", "torch.utils._pytree"):  # said at import wherever their GPU kernels cannot be loaded
        logging.getLogger(chatty).setLevel(logging.ERROR)
    storage = StorageSettings(uri=options.store, endpoint_url=options.endpoint_url)
    try:
        store = open_store(storage)
        job = read_recorded_job(store, options.job) if options.job else pin(load_job(options.spec), store)
        options.work_dir.mkdir(parents=True, exist_ok=True)
        place = EventPlace(options.job or job_id(job))
        with narrated(store, place.job), EventStream(store, place) as tell:
            try:
                carry_out(job, storage, options.work_dir, tell)
            except BaseException as error:
                tell(Ended(outcome="failed", message=_in_words(error)))
                raise
            tell(Ended(outcome="succeeded"))
    except ZenrayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, ZenrayError) else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
