"""Control as a process, on both databases: killed at random it loses and doubles nothing; asked to stop, it stops."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.contract.postgres import running_postgres
from tests.control.events import OUTPUT_TOKEN_NANO_USD, event
from zenray.control.config import ControlConfig
from zenray.spec.edge import Lease, LeaseRequest, UsageAck, UsageBatch

pytestmark = pytest.mark.contract

START_TIMEOUT_S = 60.0


class ControlProcess:
    def __init__(self, folder: Path, database_url: str | None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = ControlConfig(state_dir=folder / "state", port=port, database_url=database_url, backend="fake")
        self._file = folder / "control.json"
        self._file.write_text(config.model_dump_json())
        self._log = (folder / "log").open("ab")
        self._state = config.state_dir
        self.url = f"http://127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zenray.control", str(self._file)], stdout=self._log, stderr=self._log
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                if httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            assert self.process.poll() is None and time.monotonic() < deadline, (self._file.parent / "log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def client(self, who: str) -> httpx.Client:
        token = (self._state / f"{who}.token").read_text().strip()
        return httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {token}"}, trust_env=False, timeout=40.0
        )

    def end(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self._log.close()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "sqlite":
        yield None
        return
    with running_postgres() as server:
        yield server.url(server.new_database())


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory, database_url: str | None) -> Iterator[ControlProcess]:
    process = ControlProcess(tmp_path_factory.mktemp("control"), database_url)
    yield process
    process.end()


class Shipper(threading.Thread):
    """A gateway: leases, spends only what it was lent, ships until it is acknowledged, and now and then ships again."""

    def __init__(self, control: ControlProcess, number: int, batches: int) -> None:
        super().__init__()
        self.gateway = f"g{number}"
        self.rng = random.Random(number)
        self.client = control.client("edge")
        self.batches = batches
        self.acknowledged: list[str] = []
        self.spent_nano_usd = 0
        self.refusals: list[str] = []

    def run(self) -> None:
        credit = sequence = 0
        old: list[UsageBatch] = []
        for lease_number in range(self.batches):
            request = LeaseRequest(
                gateway_id=self.gateway, boot_id="b1", org="acme", wanted_nano_usd=100_000, sequence=lease_number
            )
            credit += Lease.model_validate_json(self._post("/edge/leases", request.model_dump_json())).granted_nano_usd
            events = []
            while credit >= 10 * OUTPUT_TOKEN_NANO_USD:
                credit -= 10 * OUTPUT_TOKEN_NANO_USD
                sequence += 1
                events.append(event(sequence, gateway=self.gateway))
            batch = UsageBatch(gateway_id=self.gateway, boot_id="b1", events=tuple(events))
            for sent in [batch, *self.rng.sample(old, min(len(old), self.rng.randint(0, 2)))]:
                UsageAck.model_validate_json(self._post("/edge/usage", sent.model_dump_json()))
            old.append(batch)
            self.acknowledged += [each.billing_key for each in events]
            self.spent_nano_usd += sum(each.cost_nano_usd() for each in events)

    def _post(self, path: str, body: str) -> bytes:
        """Sends until there is an answer. 5xx and a dead connection are tried again; a refusal is a failure."""
        while True:
            try:
                answer = self.client.post(path, content=body, headers={"content-type": "application/json"})
                if answer.status_code < 500:
                    if answer.status_code != 200:
                        self.refusals.append(answer.text)
                    return answer.content
            except httpx.HTTPError:
                pass
            time.sleep(0.02)


def test_killed_at_random_moments_it_loses_and_doubles_nothing(control: ControlProcess) -> None:
    with control.client("admin") as admin:
        admin.post("/admin/orgs", json={"name": "acme"}).raise_for_status()
        admin.post("/admin/orgs/acme/credits", json={"amount_usd": "1"}).raise_for_status()
    shippers = [Shipper(control, number, batches=60) for number in range(4)]
    for shipper in shippers:
        shipper.start()
    rng = random.Random(11)
    for _ in range(2):
        time.sleep(rng.uniform(0.2, 0.6))
        control.kill()
        control.start()
    for shipper in shippers:
        shipper.join(timeout=120)
        assert not shipper.is_alive() and shipper.refusals == []
    acknowledged = [key for shipper in shippers for key in shipper.acknowledged]
    spent = sum(shipper.spent_nano_usd for shipper in shippers)
    assert len(set(acknowledged)) == len(acknowledged) > 500
    with control.client("admin") as admin:
        balance = admin.get("/admin/orgs/acme/balance").json()
        lines = admin.get("/admin/usage?org=acme").json()["data"]
        status = admin.get("/admin/status").json()
    assert sum(line["requests"] for line in lines) == len(acknowledged)
    assert sum(line["cost_nano_usd"] for line in lines) == spent
    assert balance["balance_nano_usd"] == 10**9 - spent
    # Every answer that was lost was asked for again under its number, so nothing leaked: all that was lent is spent.
    assert balance["held_nano_usd"] == 0
    assert status["ledger"]["ok"] and status["ledger"]["differences"] == []


def test_the_same_thing_made_by_many_at_once_is_made_once(control: ControlProcess) -> None:
    def make(number: int) -> int:
        with control.client("admin") as admin:
            return admin.post("/admin/orgs", json={"name": "popular"}).status_code

    with ThreadPoolExecutor(8) as many:
        assert sorted(many.map(make, range(16))) == [201] + [409] * 15


def test_asked_to_stop_it_answers_open_polls_and_ends_within_five_seconds(control: ControlProcess) -> None:
    client = control.client("edge")
    version = client.get("/edge/snapshot?gateway_id=g1").json()["version"]
    answers: list[int] = []

    def poll() -> None:
        with control.client("edge") as mine:
            answers.append(mine.get(f"/edge/snapshot?gateway_id=g1&since={version}").json()["version"])

    polls = [threading.Thread(target=poll) for _ in range(8)]
    for thread in polls:
        thread.start()
    time.sleep(0.7)
    asked_s = time.monotonic()
    control.process.send_signal(signal.SIGTERM)
    assert control.process.wait(timeout=60) == 0
    assert time.monotonic() - asked_s < 5.0
    for thread in polls:
        thread.join()
    assert answers == [version] * 8
    control.start()
    restarted = control.client("edge").get(f"/edge/snapshot?gateway_id=g1&since={version}").json()
    assert restarted["version"] > version and restarted["full"]  # it never goes back


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prot": 1}, "Did you mean 'port'?"),
        ({"database_url": "mysql://x"}, "Use SQLite or PostgreSQL."),
        ({"database_url": "postgresql://nobody:hidden@127.0.0.1:1/x"}, "the database cannot be used: connection"),
        ({"database_url": "sqlite:////proc/nowhere/control.db"}, "/proc/nowhere"),
    ],
)
def test_a_start_that_cannot_be_is_one_clear_line(tmp_path: Path, wrong: dict[str, object], says: str) -> None:
    file = tmp_path / "control.json"
    file.write_text(json.dumps({"state_dir": str(tmp_path / "state"), **wrong}))
    ended = subprocess.run([sys.executable, "-m", "zenray.control", str(file)], capture_output=True, text=True)
    assert ended.returncode in (1, 2) and says in ended.stderr
    assert "Traceback" not in ended.stderr and "hidden" not in ended.stderr
