"""One platform for the tests: `zenray up --detach` in a folder of its own, and `zenray down` at the end."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import psutil

from zenray.cli.client import ControlClient
from zenray.cli.home import Home
from zenray.spec.platform import StorageSettings
from zenray.spec.versions import VersionRef
from zenray.storage.opening import open_store
from zenray.storage.versions import publish

REAL = "smollm2-135m"
SCRIPTED = "scripted-tiny"
ELASTIC = "scripted-elastic"  # in the catalog and in the store, for tests that deploy it as they need it
ELASTIC_TOKENS = {"v1": 16, "v2": 24}  # how many tokens an answer of each version has
TAP = Path(__file__).parent / "tap"

PLATFORM = f"""
name: e2e
ray: {{cpus: 4, gcs_port: 0, dashboard_port: 0, serve_port: 0, first_replica_port: 31500}}
control: {{port: 0, reconcile_interval_s: 0.3}}
gateway: {{port: 0, processes: 1}}
deployments:
  - model: {SCRIPTED}
    engine: {{kind: scripted}}
    autoscaling: {{min_replicas: 1, max_replicas: 1}}
    graceful_shutdown_timeout_s: 5
  - model: {REAL}
    engine: {{dtype: float32, max_model_len: 1024, max_num_seqs: 16, kv_cache_bytes: 268435456}}
    autoscaling: {{min_replicas: 1, max_replicas: 1}}
    graceful_shutdown_timeout_s: 5
"""

SCRIPTED_MODEL = """
name: {name}
family: scripted
summary: Answers by a script, for tests.
parameters: {{total: 1000000, active: 1000000}}
context_tokens: 8192
price: {{input_usd_per_1k: "0.0007", output_usd_per_1k: "0.0013"}}
"""


class TestPlatform:
    """The running platform, and ways to look into it and to break it."""

    __test__ = False  # not a test class, whatever its name says

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.tap_file = root / "tap.jsonl"
        self.file = root / "platform.yaml"
        self._environment = os.environ | {
            "ZENRAY_HOME": str(root),
            "ZENRAY_TAP_FILE": str(self.tap_file),
            "PYTHONPATH": str(TAP),
            "OMP_NUM_THREADS": "2",
        }

    def prepare(self) -> None:
        """The platform file, and a version of the scripted model."""
        root = self.home.root
        self.file.write_text(PLATFORM)
        self.home.user_catalog.mkdir(parents=True)
        store = open_store(StorageSettings(uri=f"file:{root / 'store'}"))
        for name, versions in ((SCRIPTED, {"v1": 16}), (ELASTIC, ELASTIC_TOKENS)):
            (self.home.user_catalog / f"{name}.yaml").write_text(SCRIPTED_MODEL.format(name=name))
            for version, tokens in versions.items():
                folder = root / "scripted" / name / version
                folder.mkdir(parents=True)
                (folder / "script.json").write_text(json.dumps({"tokens": tokens}))
                publish(store, VersionRef(model=name, version=version), folder)

    def zenray(self, *arguments: str, check: bool = True, timeout_s: float = 400, stdin: str = "") -> str:
        """Run the command as a user would; its output, both streams."""
        done = subprocess.run(
            [sys.executable, "-m", "zenray.cli.main", *arguments],
            env=self._environment,
            input=stdin,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode:
            logs = "".join(f"\n--- {log}\n{log.read_text()[-3000:]}" for log in sorted(self.home.logs.glob("*.log")))
            raise AssertionError(f"zenray {' '.join(arguments)} exited with {done.returncode}:\n{done.stdout}{logs}")
        return done.stdout

    def control(self) -> ControlClient:
        platform = self.home.running()
        return ControlClient(platform.control_url, self.home.admin_token_file.read_text().strip())

    def customer(self, name: str, *, usd: str | None = "10", scopes: tuple[str, ...] = ("*",)) -> openai.OpenAI:
        """A new organisation with credit, and a client with a key of it that never retries by itself."""
        control = self.control()
        control.post("/admin/orgs", {"name": name})
        if usd is not None:
            control.post(f"/admin/orgs/{name}/credits", {"amount_usd": usd})
        key = control.post("/admin/keys", {"org": name, "scopes": list(scopes)})["key"]
        client = openai.OpenAI(base_url=f"{self.home.running().gateway_url}/v1", api_key=key, max_retries=0, timeout=60)
        wait_until(lambda: _knows(client), "the gateway knows the new key", 60)
        return client

    def kill(self, part: str) -> None:
        """kill -9 of a part's main process and its children, as an out-of-memory killer would, once it runs."""
        process = wait_until(lambda: self._running(part), f"{part} runs", 60)
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()

    def _running(self, part: str) -> psutil.Process | None:
        pid = next(p.pid for p in self.home.running().parts if p.name == part)
        try:
            process = None if pid is None else psutil.Process(pid)
            return process if process and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None

    def rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """Rows of control's database, read beside it."""
        connection = sqlite3.connect(f"file:{self.home.root / 'control' / 'control.db'}?mode=ro", uri=True, timeout=10)
        try:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(sql, values)]
        finally:
            connection.close()

    def processes(self) -> list[psutil.Process]:
        """All living processes that this platform started: they carry its folder in their environment."""
        marker = str(self.home.root)
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("ZENRAY_HOME") == marker and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float) -> Any:
    """The first true value of `condition`; AssertionError naming `what` when there is none in time."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


def _knows(client: openai.OpenAI) -> bool:
    try:
        client.models.list()
    except (openai.AuthenticationError, openai.APIConnectionError, openai.InternalServerError):
        return False
    return True


def charge_of(price: str, input_tokens: int, cached_input_tokens: int, output_tokens: int) -> int:
    """The cost in nano-dollars by the price of an event, computed here anew with whole numbers."""
    given = json.loads(price)

    def leg(tokens: int, usd_per_1k: str) -> int:
        whole, _, places = usd_per_1k.partition(".")
        scale = 10 ** len(places)
        numerator, denominator = tokens * int(whole + places) * 10**6, scale
        quotient, rest = divmod(numerator, denominator)
        if 2 * rest > denominator or (2 * rest == denominator and quotient % 2):
            quotient += 1
        return quotient

    return (
        leg(input_tokens - cached_input_tokens, given["input_usd_per_1k"])
        + leg(cached_input_tokens, given["cached_input_usd_per_1k"])
        + leg(output_tokens, given["output_usd_per_1k"])
    )
