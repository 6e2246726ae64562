"""Compiled programs that benchmarks are driven by: nginx with its echo module, wrk, and readers written in C.

Those of Debian are unpacked into .zenray/bench where the system has them not: no root is needed, and nothing is
installed or started on the machine.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HOME = Path(".zenray/bench")
UNPACKED = HOME / "debian"
PACKAGES = ("nginx", "libnginx-mod-http-echo", "wrk", "libluajit2-5.1-2")
NGINX, WRK = Path("usr/sbin/nginx"), Path("usr/bin/wrk")
ECHO_MODULE = Path("usr/lib/nginx/modules/ngx_http_echo_module.so")
HINT = "On Debian: apt-get install nginx libnginx-mod-http-echo wrk"


@cache
def root() -> Path:
    """The folder below which all three lie: / or the unpacked packages. Exits when they cannot be had."""
    for folder in (Path("/"), UNPACKED.absolute()):
        if all((folder / program).exists() for program in (NGINX, WRK, ECHO_MODULE)):
            return folder
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        sys.exit(f"nginx, its echo module or wrk is missing. {HINT}")
    HOME.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOME) as name:
        folder = Path(name)
        done = _download(folder)
        if done.returncode and os.geteuid() == 0:  # lists of packages that are old, or not there
            subprocess.run(["apt-get", "update"], capture_output=True)
            done = _download(folder)
        if done.returncode:
            sys.exit(f"{done.stderr}\nnginx, its echo module or wrk could not be fetched. {HINT}")
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", package, folder / "unpacked"], check=True)
        (folder / "unpacked").replace(UNPACKED)
    return UNPACKED.absolute()


def _download(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, capture_output=True, text=True)


def nginx() -> Path:
    return root() / NGINX


def echo_module() -> Path:
    return root() / ECHO_MODULE


def wrk() -> tuple[Path, dict[str, str]]:
    """The program, and the environment in which it finds its libraries."""
    libraries = next((root() / "usr/lib").glob("*-linux-gnu"))
    return root() / WRK, os.environ if root() == Path("/") else os.environ | {"LD_LIBRARY_PATH": str(libraries)}


def compiled(source: str) -> Path:
    """A program of one C file beside this one, compiled once for each of its versions."""
    path = Path(__file__).with_name(source)
    program = (HOME / f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}").absolute()
    if not program.exists():
        compiler = shutil.which("cc") or sys.exit("A C compiler is missing. On Debian: apt-get install gcc libc6-dev")
        HOME.mkdir(parents=True, exist_ok=True)
        unfinished = program.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-O2", "-Wall", "-o", str(unfinished), str(path)], check=True)
        unfinished.replace(program)
    return program
