"""Importing costs nothing and does nothing."""

from __future__ import annotations

import subprocess
import sys

from tests.house.test_shape import MODULES, ROOT

HEAVY_ROOTS = ("zenray.model", "zenray.training", "zenray.serving")  # these may import torch, ray, vllm: seconds
GATEWAY_S = 1.0

# Run in a process of its own: imports every module named on the command line, with an audit hook that stops on what
# an import must not do. Files of Python itself (byte code) are written by the import system and are let through.
WATCHED_IMPORT = """
import importlib, os, sys, threading
import asyncio, concurrent.futures, ctypes, logging.config, multiprocessing, sqlite3, ssl, uuid  # not what is tested
names = sys.argv[1:]
done = []
def hook(event, args):
    if event in ("socket.bind", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.fork", "os.posix_spawn",
                 "os.mkdir", "os.remove", "os.rename", "sqlite3.connect", "_thread.start_new_thread"):
        frame, ours = sys._getframe(), None
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.startswith("zenray") and frame.f_code.co_name == "<module>":
                ours = frame.f_code.co_filename
            if module == "importlib._bootstrap_external" and frame.f_code.co_name in ("set_data", "_write_atomic"):
                return
            frame = frame.f_back
        if ours:
            done.append(f"{ours}: {event} {args!r}")
    elif event == "open" and isinstance(args[1], str) and any(c in args[1] for c in "wax+"):
        done.append(f"open {args!r}")
sys.addaudithook(hook)
for name in names:
    importlib.import_module(name)
extra = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
print("\\n".join([*done, *(f"thread {name}" for name in extra)]))
"""


def module_name(path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_does_no_work():
    names = [module_name(path) for path in MODULES]
    light = [name for name in names if not name.startswith(HEAVY_ROOTS) and not name.endswith("__main__")]
    assert python(WATCHED_IMPORT, *light) == ""


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
