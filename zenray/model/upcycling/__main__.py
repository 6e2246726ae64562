"""`python -m zenray.model.upcycling SPEC --store URI --work-dir DIR`: one upcycling job, as `zenray run` starts it."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from zenray.spec.documents import load_document
from zenray.spec.errors import ZenrayError
from zenray.spec.jobs import UpcycleJob
from zenray.spec.platform import StorageSettings
from zenray.storage.opening import open_store
from zenray.storage.progress import transfer_bar


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when all is published; 1 with the error on stderr."""
    parser = argparse.ArgumentParser(prog="python -m zenray.model.upcycling", description=__doc__)
    parser.add_argument("spec", type=Path, help="a job file of kind upcycle")
    parser.add_argument("--store", required=True, help="file:/absolute/path or s3://BUCKET/PREFIX")
    parser.add_argument("--endpoint-url", help="for S3 servers other than Amazon's")
    parser.add_argument("--work-dir", type=Path, required=True, help="for the base version's cache and the result")
    options = parser.parse_args(arguments)
    # Said at import on every machine without their GPU kernels; it helps nobody who waits for a model.
    for chatty in ("torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from zenray.model.upcycling.runner import run  # imports torch and transformers

    try:
        job = load_document(options.spec, UpcycleJob)
        store = open_store(StorageSettings(uri=options.store, endpoint_url=options.endpoint_url))
        with transfer_bar() as progress:
            published = run(job, store, options.work_dir, progress=progress)
    except ZenrayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for manifest in published:
        print(f"published {manifest.ref} ({manifest.size_bytes / 1e6:,.0f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
