"""`python -m zenray.training.data FOLDER`: the small real corpus, one jsonl file with labels for each domain."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from zenray.spec.training import BuiltinCorpus, DataSource
from zenray.training.data.documents import write_corpus


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zenray.training.data", description=__doc__)
    parser.add_argument("folder", type=Path, help="is made; files in it are replaced")
    parser.add_argument("--domains", nargs="+", choices=get_args(BuiltinCorpus), default=get_args(BuiltinCorpus))
    options = parser.parse_args(arguments)
    sources = [DataSource(domain=name, builtin=name) for name in options.domains]
    for domain, count in write_corpus(options.folder, sources).items():
        path = options.folder / f"{domain}.jsonl"
        print(f"{path}: {count:,} documents, {path.stat().st_size / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
