"""Write `requirements/{cpu,gpu}.lock`: every package that zenray needs, at one version, with the hash of its file.

    python scripts/lock.py cpu        # resolves requirements/cpu.in with pip, writes requirements/cpu.lock
    python scripts/lock.py gpu        # fetches some 4 GB: pip looks into a few large wheels to resolve them

The lock is installed with `pip install --no-deps --require-hashes`, so what is not in it is not installed. On the cpu
three packages are left out on purpose: torchvision, torchaudio and torchcodec come along with vLLM, but their wheels
are built for CUDA and break `import transformers` beside a CPU build of torch. torch itself stands in a file of its
own: its CPU build lives on different indexes on different machines (see `scripts/setup.py`) and so has no hash; the
CUDA build has one. The files are those of Linux on x86-64 with Python 3.11. Use a recent pip (26.3 wrote these).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LEFT_OUT = {"cpu": {"torchvision", "torchaudio", "torchcodec"}, "gpu": set()}
APART = {"torch"}
KEPT_SETTINGS = {"PIP_CERT", "PIP_PROXY", "PIP_DEFAULT_TIMEOUT", "PIP_CACHE_DIR"}
ROOT = Path(__file__).resolve().parent.parent / "requirements"


def environment(platform: str) -> dict[str, str]:
    """What pip runs with. The CUDA builds are all on the ordinary index: a machine that is set to prefer CPU builds
    must not leak them into the gpu lock, so there pip's own settings do not count."""
    if platform == "cpu":
        return dict(os.environ)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") or name in KEPT_SETTINGS}
    return {**kept, "PIP_CONFIG_FILE": os.devnull}


def resolve(platform: str) -> list[dict]:
    """What pip would install for the platform, as the entries of its report."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", report.name, "-r", str(ROOT / f"{platform}.in")]
        subprocess.run(command, check=True, env=environment(platform))
        return json.loads(Path(report.name).read_text())["install"]


def main(platform: str) -> None:
    locked, apart = [], []
    for entry in resolve(platform):
        name, version = entry["metadata"]["name"].lower().replace("_", "-"), entry["metadata"]["version"]
        if name in LEFT_OUT[platform]:
            continue
        line = f"{name}=={version}"
        if name not in APART or platform == "gpu":
            line += f" --hash=sha256:{entry['download_info']['archive_info']['hashes']['sha256']}"
        (apart if name in APART else locked).append(line)
    head = f"# Written by scripts/lock.py from requirements/{platform}.in; do not edit.\n"
    (ROOT / f"{platform}.lock").write_text(head + "\n".join(sorted(locked)) + "\n")
    (ROOT / f"{platform}-torch.lock").write_text(head + "\n".join(apart) + "\n")
    print(f"requirements/{platform}.lock: {len(locked)} packages, and {apart[0].split()[0]}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in LEFT_OUT:
        sys.exit("Which platform? Write: python scripts/lock.py cpu, or: python scripts/lock.py gpu")
    main(sys.argv[1])
