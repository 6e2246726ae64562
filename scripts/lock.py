"""Write `requirements/{cpu,gpu}.lock`: every package that zenray needs, at one version, with the hash of its files.

    python scripts/lock.py cpu        # resolves requirements/cpu.in with pip, writes requirements/cpu.lock

The lock is installed with `pip install --no-deps --require-hashes`, so what is not in it is not installed. Three
packages are left out on purpose: torchvision, torchaudio and torchcodec come along with vLLM, but their wheels are
built for CUDA and break `import transformers` beside a CPU build of torch. torch itself stands in a file of its own
without a hash, because a CPU build lives on different indexes on different machines (see `scripts/setup.sh`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
APART = {"torch"}
ROOT = Path(__file__).resolve().parent.parent / "requirements"


def resolve(requirements: Path) -> list[dict]:
    """What pip would install for `requirements`, as the entries of its report."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", report.name, "-r", str(requirements)], check=True)
        return json.loads(Path(report.name).read_text())["install"]


def main(platform: str) -> None:
    entries = resolve(ROOT / f"{platform}.in")
    locked, apart = [], []
    for entry in sorted(entries, key=lambda e: e["metadata"]["name"].lower().replace("_", "-")):
        name, version = entry["metadata"]["name"].lower().replace("_", "-"), entry["metadata"]["version"]
        if name in LEFT_OUT:
            continue
        if name in APART:
            apart.append(f"{name}=={version}")
            continue
        sha256 = entry["download_info"]["archive_info"]["hashes"]["sha256"]
        locked.append(f"{name}=={version} --hash=sha256:{sha256}")
    head = f"# Written by scripts/lock.py from requirements/{platform}.in; do not edit.\n"
    (ROOT / f"{platform}.lock").write_text(head + "\n".join(locked) + "\n")
    (ROOT / f"{platform}-torch.lock").write_text(head + "\n".join(apart) + "\n")
    print(f"requirements/{platform}.lock: {len(locked)} packages, and {', '.join(apart)}")


if __name__ == "__main__":
    main(sys.argv[1])
