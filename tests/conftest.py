"""What holds for every test: a clean environment, one thread per process, and, for fast tests, no expensive world."""

from __future__ import annotations

import gc
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

HEAVY = {"contract", "parity", "e2e"}  # folders of tests/ whose tests may use the real world
LONGEST_SLEEP_S = 0.05

# Before anything is imported: settings of the person who runs the tests must not reach them, and torch reads the
# number of threads when it is loaded (two processes with a thread per core each slow one another down tenfold).
_FOREIGN = ("ZENRAY_", "OPENAI_", "AWS_", "RAY_", "VLLM_", "HF_", "PG")
for _name in [name for name in os.environ if name.startswith(_FOREIGN) and name != "AWS_CA_BUNDLE"]:
    del os.environ[_name]
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # boto3 would look for credentials on a link-local address

# No deadline: on a busy machine it fails tests for being slow once. `make nightly` asks for the second profile.
hypothesis.settings.register_profile("check", max_examples=40, deadline=None)
hypothesis.settings.register_profile("nightly", max_examples=1000, deadline=None)
hypothesis.settings.load_profile("check")


def pytest_collection_finish() -> None:
    """What importing made stays to the end. Not looking at it again saves a seventh of the fast tests' CPU, and
    looking more rarely at what tests leave saves a tenth of what remains."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # bindings complain, as Python ends, of what is never collected


@pytest.fixture(autouse=True)
def _environment_is_put_back() -> Iterator[None]:
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@pytest.fixture(autouse=True)
def _denormals_are_put_back() -> Iterator[None]:
    """Training flushes them in the process that it runs in; other tests, and hypothesis, need them."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_flush_denormal(False)


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function that names a port of 127.0.0.1 on which nobody listens now. Prefer binding port 0 yourself."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


@pytest.fixture(autouse=True)
def _no_expensive_world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fast tests start no Ray, leave the machine by no socket, and wait for nothing longer than 0.05 s."""
    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    if folder in HEAVY:
        yield
        return
    broken: list[str] = []

    def refuse(what: str) -> None:
        broken.append(what)
        pytest.fail(f"{what}. Fast tests do not; move it to tests/contract or tests/e2e.")

    def guarded_connect(original: Callable[..., object]) -> Callable[..., object]:
        def connect(self: socket.socket, address: object) -> object:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address):
                refuse(f"the test connects to {address}")
            return original(self, address)

        return connect

    real_sleep = time.sleep

    def sleep(seconds: float) -> None:
        if seconds > LONGEST_SLEEP_S:
            refuse(f"the test sleeps {seconds} s (pass a FakeClock instead)")
        real_sleep(seconds)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect(socket.socket.connect_ex))
    monkeypatch.setattr(time, "sleep", sleep)
    if "ray" in sys.modules:
        monkeypatch.setattr(sys.modules["ray"], "init", lambda *_, **__: refuse("the test starts Ray"))
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
        broken.append("the test started Ray")
    assert not broken, broken  # also where a thread or an `except` swallowed the failure


def _is_loopback(address: object) -> bool:
    host = address[0] if isinstance(address, tuple) else address
    try:
        return host == "localhost" or ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False
