"""The guards of tests/conftest.py do stop what they forbid, and let heavy layers through."""

from __future__ import annotations

import textwrap

import pytest

from tests.house.test_shape import ROOT

pytest_plugins = ["pytester"]

FAST = """
import os, socket, threading, time

def test_loopback_is_allowed(free_port):
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", free_port()))
        server.listen()
        client.connect(server.getsockname())

def test_the_network_is_refused():
    socket.create_connection(("192.0.2.1", 9), timeout=0.01)

def test_swallowing_the_refusal_does_not_help():
    try:
        socket.socket().connect(("192.0.2.1", 9))
    except BaseException:
        pass

def test_a_long_sleep_is_refused():
    time.sleep(0.06)

def test_a_thread_that_sleeps_is_noticed():
    thread = threading.Thread(target=lambda: time.sleep(0.06))
    thread.start()
    thread.join()

def test_a_short_sleep_is_allowed():
    time.sleep(0.001)

def test_settings_of_the_person_do_not_reach_tests():
    assert not [name for name in os.environ if name.startswith(("ZENRAY_", "OPENAI_"))]
    os.environ["ZENRAY_HOME"] = "left behind"

def test_what_a_test_sets_is_put_back():
    assert "ZENRAY_HOME" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == "1"
"""
HEAVY = """
import time

def test_real_time():
    time.sleep(0.06)
"""


def test_guards(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of the person")
    pytester.path.joinpath("conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    for folder, text in (("spec", FAST), ("e2e", HEAVY)):
        pytester.mkdir(folder)
        pytester.path.joinpath(folder, f"test_{folder}.py").write_text(textwrap.dedent(text))
    outcome = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:randomly", "-W", "ignore")
    # A test whose failure was swallowed, or happened in a thread, passes and then errs when it is torn down.
    outcome.assert_outcomes(passed=7, failed=2, errors=4)
    outcome.stdout.fnmatch_lines(["*connects to ('192.0.2.1', 9)*"])
