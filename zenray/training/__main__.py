"""`python -m zenray.training SPEC --store URI --work-dir DIR`: one training job, as `zenray run` starts it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zenray.spec.errors import InvalidDocument, ZenrayError
from zenray.spec.jobs import load_job
from zenray.spec.platform import StorageSettings
from zenray.spec.training import DistillJob, PretrainJob
from zenray.storage.progress import transfer_bar
from zenray.training.runner import run


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when the version is published; 1 with the error on stderr."""
    parser = argparse.ArgumentParser(prog="python -m zenray.training", description=__doc__)
    parser.add_argument("spec", type=Path, help="a job file of kind pretrain or distill")
    parser.add_argument("--store", required=True, help="file:/absolute/path or s3://BUCKET/PREFIX")
    parser.add_argument("--endpoint-url", help="for S3 servers other than Amazon's")
    parser.add_argument("--work-dir", type=Path, required=True, help="for downloads, tokens and events")
    options = parser.parse_args(arguments)
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
