"""Importing costs nothing and does nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.test_shape import MODULES, ROOT

HEAVY_ROOTS = ("zenray.model", "zenray.training", "zenray.serving")  # these may import torch, ray, vllm: seconds
GATEWAY_S = 1.0

# Run in a process of its own: imports every module named on the command line, with an audit hook that notes what an
# import must not do, and prints it.
WATCHED_IMPORT = """
import importlib, sys, threading
names = sys.argv[1:]
done = []
work = {"socket.bind", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.fork", "os.posix_spawn",
        "os.mkdir", "os.remove", "os.rename", "sqlite3.connect", "a thread"}
def hook(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if event not in work and not writes:
        return
    # Whose import is it? The nearest module that is being run decides: a library may look around when it is loaded.
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    if frame is not None and frame.f_globals.get("__name__", "").startswith("zenray"):
        done.append(f"{frame.f_globals['__name__']}: {event} {args!r}")
sys.addaudithook(hook)
start = threading.Thread.start
threading.Thread.start = lambda self: (sys.audit("a thread", self.name), start(self))[1]
for name in names:
    importlib.import_module(name)
print("\\n".join(done))
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python(program: str, *arguments: str, cwd: Path = ROOT) -> str:
    """What `program` prints. Without byte code (-B), whose files are none of the module's doing."""
    done = subprocess.run([sys.executable, "-B", "-c", program, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_does_no_work():
    names = [module_name(path) for path in MODULES]
    # Alembic's scripts are run by Alembic, not imported; a `__main__` is there to do work.
    light = [
        name for name in names if not name.startswith(HEAVY_ROOTS) and not re.search("__main__|[.]migrations[.]", name)
    ]
    assert python(WATCHED_IMPORT, *light) == ""


@pytest.mark.parametrize(
    "line",
    [
        "import socket; socket.socket().bind(('127.0.0.1', 0))",
        "open('left-behind', 'w')",
        "import threading; threading.Thread(target=int).start()",
        "import subprocess; subprocess.run(['true'])",
    ],
)
def test_work_at_import_is_noticed(line: str, tmp_path: Path):
    (tmp_path / "zenray_busy.py").write_text(line)
    assert "zenray_busy" in python(WATCHED_IMPORT, "zenray_busy", cwd=tmp_path)


def test_the_gateway_starts_light():
    """Under a second of CPU, and without the heavy dependencies, whoever else imports them."""
    names = [module_name(path) for path in MODULES if module_name(path).startswith("zenray.gateway")]
    program = (
        "import importlib, sys, time\n"
        "for name in sys.argv[1:]:\n"
        "    name.endswith('__main__') or importlib.import_module(name)\n"
        "heavy = {'torch', 'ray', 'vllm', 'sqlalchemy', 'transformers', 'boto3', 'numpy'} & set(sys.modules)\n"
        "print(time.process_time(), *sorted(heavy))"
    )
    cpu_s, *heavy = python(program, *names).split()
    assert heavy == []
    assert float(cpu_s) < GATEWAY_S
