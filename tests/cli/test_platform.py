"""Up, down and status without starting anything: who holds the folder, what is said, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from starlette.testclient import TestClient

from tests.cli.test_commands import MODEL, Zenray, control, zenray  # noqa: F401
from tests.cli.test_jobs import JOB
from zenray.cli import demo
from zenray.cli.client import ControlClient
from zenray.cli.commands import platform as commands
from zenray.cli.home import Home, RunningPart, RunningPlatform
from zenray.cluster.session import SessionRecord
from zenray.spec.errors import Unavailable
from zenray.spec.platform import StorageSettings
from zenray.spec.versions import VersionRef
from zenray.storage.opening import open_store
from zenray.storage.versions import publish

HOLDER = """
from zenray.cli.home import Home
with Home.from_environment().held():
    print("held", flush=True)
    input()
"""

SLOW_HOLDER = """
import signal, time
from zenray.cli.home import Home
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
with Home.from_environment().held():
    print("held", flush=True)
    while len(asked) < 2:
        time.sleep(0.01)
    time.sleep(0.3)
"""


@pytest.fixture
def home(control: TestClient) -> Home:  # noqa: F811
    return Home.from_environment()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with any platform, in a session of its own."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    yield process
    process.kill()
    process.communicate()


def announce(home: Home, supervisor_pid: int, **changes: Any) -> None:
    """Write `platform.json` as a supervisor does."""
    log = str(home.logs / "control.log")
    running = RunningPlatform(
        name="test",
        supervisor_pid=supervisor_pid,
        gateway_url="http://127.0.0.1:1",
        control_url="http://127.0.0.1:2",
        dashboard_url="http://127.0.0.1:3",
        storage=StorageSettings(uri=f"file:{home.root / 'store'}"),
        key_prefix="sk-zen-",
        stop_timeout_s=90,
        parts=[
            RunningPart(name="control", pid=11, restarts=4, is_running=False, log=log),
            RunningPart(name="gateway", pid=12, log="g"),
        ],
    )
    home.platform_file.write_text(running.model_copy(update=changes).model_dump_json())


def test_whoever_holds_the_folder_is_known_and_nobody_else_gets_it(home: Home) -> None:
    assert home.supervisor_pid() is None
    with home.held():
        assert home.supervisor_pid() == os.getpid()
        with pytest.raises(Unavailable, match="already runs"), home.held():
            pass
        assert home.supervisor_pid() == os.getpid(), "asking and being refused take nothing away"
        with pytest.raises(Unavailable, match=f"starting or stopping .process {os.getpid()}"):
            home.running()
        announce(home, os.getpid())
        assert home.running().name == "test"
    assert home.supervisor_pid() is None and home.running_or_none() is None


def test_a_number_in_a_file_that_a_dead_supervisor_left_is_nobody_s_death(
    home: Home,
    zenray: Zenray,  # noqa: F811
    sleeper: subprocess.Popen[bytes],
) -> None:
    with home.held():
        pass
    announce(home, sleeper.pid)  # the supervisor was killed, and its number given to somebody else
    assert "No platform runs" in zenray("status", fails=True)
    assert "Nothing runs" in zenray("down")
    assert sleeper.poll() is None


def test_down_in_a_folder_that_never_was_one_makes_none(home: Home, zenray: Zenray) -> None:  # noqa: F811
    assert "Nothing runs" in zenray("down")
    assert not home.run.exists()


def test_down_ends_a_platform_that_is_still_starting(home: Home, zenray: Zenray) -> None:  # noqa: F811
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert home.supervisor_pid() == holder.pid
    assert "Stopped" in zenray("down")
    holder.communicate()
    assert holder.returncode == -15


def test_down_waits_as_long_as_the_platform_lets_its_streams_go_on(
    home: Home,
    zenray: Zenray,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commands, "STOP_TIMEOUT_S", 0.0)
    holder = subprocess.Popen([sys.executable, "-c", SLOW_HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert "has not ended after 0 s" in zenray("down", fails=True)
    announce(home, holder.pid, stop_timeout_s=30)
    assert "Stopped" in zenray("down")
    holder.communicate()


def test_down_ends_the_ray_that_a_killed_supervisor_left(
    home: Home,
    zenray: Zenray,  # noqa: F811
    sleeper: subprocess.Popen[bytes],
) -> None:
    with home.held():
        pass
    home.ray.mkdir()
    record = SessionRecord(sleeper.pid, time.time(), psutil.boot_time(), "/tmp/none", 1, 2, 3)
    record.write(home.ray / "ray.json")
    assert "1 processes of Ray that it had left are ended" in zenray("down")
    assert record.processes() == []
    assert "Nothing runs" in zenray("down")


def test_status_shows_the_parts_when_control_is_away(
    home: Home,
    zenray: Zenray,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ControlClient, "connect", lambda home: ControlClient("http://127.0.0.1:2", "t"))
    with home.held():
        announce(home, os.getpid())
        shown = zenray("status", fails=True)
        as_json = zenray("status", "--json", fails=True)
    assert "restarting" in shown and "gateway" in shown
    assert "http://127.0.0.1:2 does not answer" in shown and "control.log" in shown
    assert "`zenray status`" not in shown, "that is what was just asked"
    document, _ = json.JSONDecoder().raw_decode(as_json)
    assert document["control"] is None and document["platform"]["parts"][0]["restarts"] == 4


def test_status_shows_what_is_asked_for_before_it_serves(
    home: Home,
    zenray: Zenray,  # noqa: F811
    control: TestClient,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "weights.bin").write_bytes(b"w")
    publish(open_store(home.storage()), VersionRef(model=MODEL, version="v1"), tmp_path / "made")
    with home.held():
        announce(home, os.getpid(), storage=home.storage())
        assert "Nothing is deployed yet" in zenray("status")
        zenray("deploy", MODEL, "--no-wait")
        shown = zenray("status")
    (row,) = [line for line in shown.splitlines() if line.startswith(MODEL)]
    assert row.split()[1:3] == ["pending", "0"] and row.split()[3].startswith("smollm2-135m-"), shown
    assert "Every balance is the sum" in shown


def test_a_job_is_not_run_beside_a_platform_that_is_starting(
    home: Home,
    zenray: Zenray,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ControlClient, "connect", lambda home: home.running())
    job = tmp_path / "job.yaml"
    job.write_text(JOB)
    with home.held():
        assert "starting or stopping" in zenray("run", str(job), fails=True)


class FakeSupervisor:
    """The process that `up --detach` starts; `begin` is what it does in the folder."""

    started: list[FakeSupervisor]

    def __init__(self, command: list[str], **_: object) -> None:
        self.asked: list[str] = []
        self.started.append(self)
        self.begin()

    def begin(self) -> None: ...

    def poll(self) -> int | None:
        return None

    def terminate(self) -> None:
        self.asked.append("terminate")

    def wait(self) -> None:
        self.asked.append("wait")


@pytest.fixture
def supervisors(monkeypatch: pytest.MonkeyPatch) -> list[FakeSupervisor]:
    """All that were started, none of which comes to anything."""
    FakeSupervisor.started = []
    monkeypatch.setattr(commands.subprocess, "Popen", FakeSupervisor)
    monkeypatch.setattr(commands, "check_machine", lambda platform, folder: None)
    return FakeSupervisor.started


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "platform.yaml"
    path.write_text("name: test\n")
    return str(path)


@pytest.mark.parametrize("why", [KeyboardInterrupt(), SystemExit(1)])
def test_what_is_half_started_is_stopped_on_ctrl_c(
    why: BaseException,
    zenray: Zenray,  # noqa: F811
    supervisors: list[FakeSupervisor],
    file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(path: Path, count: int) -> list[str]:
        raise why

    monkeypatch.setattr(commands, "last_lines", interrupted)
    zenray("up", "-f", file, "--detach", fails=True)
    assert supervisors[0].asked == ["terminate", "wait"]


def test_a_platform_that_does_not_come_up_in_time_is_stopped(
    zenray: Zenray,  # noqa: F811
    supervisors: list[FakeSupervisor],
    file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commands, "DETACHED_START_TIMEOUT_S", 0)
    assert "not up after 0 s" in zenray("up", "-f", file, "--detach", fails=True)
    assert supervisors[0].asked == ["terminate", "wait"]


def test_what_can_be_known_beforehand_is_said_before_anything_is_started(
    zenray: Zenray,  # noqa: F811
    supervisors: list[FakeSupervisor],
    file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_small(platform: object, folder: Path) -> None:
        raise Unavailable("Only 0.1 GiB are free.")

    monkeypatch.setattr(commands, "check_machine", too_small)
    assert "0.1 GiB" in zenray("up", "-f", file, "--detach", fails=True)
    assert supervisors == []


def test_weights_are_fetched_before_the_time_to_start_runs(
    zenray: Zenray,  # noqa: F811
    supervisors: list[FakeSupervisor],
    file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.setattr(commands, "pull_missing", lambda home, platform: seen.append(len(supervisors)))
    monkeypatch.setattr(commands, "DETACHED_START_TIMEOUT_S", 0)
    zenray("up", "-f", file, "--detach", fails=True)
    assert seen == [0], "with a bar that is seen, and by us"


def test_one_wrong_deployment_holds_up_no_other_and_its_reason_is_shown(
    home: Home,
    zenray: Zenray,  # noqa: F811
    control: TestClient,  # noqa: F811
    supervisors: list[FakeSupervisor],
    file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the supervisor asks for them, and as `up --detach` tells of them."""
    Path(file).write_text(f"name: t\ndeployments:\n  - {{model: smollm2-135}}\n  - {{model: {MODEL}, version: v9}}\n")
    platform = commands.load_document(Path(file), commands.Platform)
    client = ControlClient.connect(home)
    refused = commands.ask_for(client, platform.deployments)
    assert list(refused) == ["smollm2-135", MODEL] and "Did you mean" in refused["smollm2-135"]
    monkeypatch.setattr(commands, "pull_missing", lambda home, platform: None)
    with home.held():
        monkeypatch.setattr(Home, "supervisor_pid", _nobody_at_first())
        announce(home, os.getpid(), refused=refused)
        shown = zenray("up", "-f", file, "--detach", fails=True)
    assert "Did you mean" in shown and "v9" in shown and supervisors[0].asked == [], "the platform itself stays up"


@pytest.mark.parametrize(("why", "asked"), [(KeyboardInterrupt(), []), (SystemExit(143), [signal.SIGINT])])
def test_the_demo_ends_only_after_the_command_that_it_runs(
    why: BaseException, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminal tells both of Ctrl-C; of any other end we have to tell the command."""
    diary: list[object] = []

    class Command:
        def __init__(self, command: list[str]) -> None: ...

        def wait(self) -> int:
            diary.append("wait")
            if diary == ["wait"]:
                raise why
            return 130

        def send_signal(self, number: int) -> None:
            diary.append(number)

    monkeypatch.setattr(demo.subprocess, "Popen", Command)
    with pytest.raises(type(why)):
        demo._zenray("up", "--detach")
    assert diary == ["wait", *asked, "wait"]


def _nobody_at_first() -> Any:
    answers = iter([None])
    return lambda home: next(answers, os.getpid())


def test_a_folder_that_cannot_be_made_is_one_clear_line(
    zenray: Zenray,  # noqa: F811
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "taken").write_text("not a folder")
    monkeypatch.setenv("ZENRAY_HOME", str(tmp_path / "taken" / "home"))
    for words in (("up", "-f", file), ("up", "-f", file, "--detach")):
        shown = zenray(*words, fails=True)
        assert "error: Not a directory" in shown and str(tmp_path / "taken") in shown and "Traceback" not in shown
