"""`zenray run` and `zenray jobs` against the real control with a fake cluster, and without a platform."""

from __future__ import annotations

import json
import select
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.cli.test_commands import Zenray, control, zenray  # noqa: F401
from zenray.cli import following
from zenray.cli.client import ControlClient
from zenray.cli.commands import runs
from zenray.cli.commands.jobs import run_time
from zenray.cluster.fake import FakeCluster
from zenray.control.app import Control
from zenray.spec.errors import Unavailable
from zenray.spec.platform import StorageSettings
from zenray.spec.versions import VersionRef
from zenray.storage.job_record import job_journal
from zenray.storage.opening import open_store
from zenray.storage.versions import publish

JOB = """
kind: upcycle
name: grow
base: {model: dense}
into: {model: mode, version: v1}
groups: [{name: general, experts: 4}]
"""


@pytest.fixture
def job_file(tmp_path: Path, control: TestClient) -> Path:  # noqa: F811
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"w")
    publish(store(tmp_path), VersionRef(model="dense", version="v3"), folder)
    path = tmp_path / "grow.yaml"
    path.write_text(JOB)
    return path


def store(tmp_path: Path):  # type: ignore[no-untyped-def]
    return open_store(StorageSettings(uri=f"file:{tmp_path / 'home' / 'store'}"))


@pytest.fixture
def on_a_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZENRAY_CONTROL_URL", "http://control")


def parts(control: TestClient) -> tuple[Control, FakeCluster]:  # noqa: F811
    built = control.built  # type: ignore[attr-defined]
    return built, built.jobs._backend


def say(tmp_path: Path, id: str, *events: dict[str, object]) -> None:
    job_journal(store(tmp_path), id).append(list(events))


def submitted(zenray: Zenray, job_file: Path) -> str:  # noqa: F811
    zenray("run", str(job_file))
    (row,) = json.loads(zenray("jobs", "list", "--json"))
    return str(row["id"])


@pytest.mark.usefixtures("on_a_platform")
class TestOnAPlatform:
    def test_a_job_is_submitted_with_its_versions_pinned(self, zenray: Zenray, job_file: Path) -> None:  # noqa: F811
        assert "is queued" in zenray("run", str(job_file))
        assert "is queued" in zenray("run", str(job_file))
        (row,) = json.loads(zenray("jobs", "list", "--json"))
        assert (row["name"], row["state"], row["into"]) == ("grow", "queued", "mode@v1")
        shown = json.loads(zenray("jobs", "show", "grow", "--json"))
        assert shown["document"]["base"] == {"model": "dense", "version": "v3", "format": "safetensors"}
        assert row["id"] in zenray("jobs", "list") and "queued" in zenray("jobs", "show", "grow")

    def test_it_is_followed_to_its_end(
        self,
        zenray: Zenray,  # noqa: F811
        control: TestClient,  # noqa: F811
        job_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Control goes away once meanwhile; what is shown is the same."""
        built, cluster = parts(control)
        id = submitted(zenray, job_file)
        built.jobs.step()
        built.jobs.step()
        say(
            tmp_path,
            id,
            {"event": "started", "kind": "distill", "steps": 2},
            {"event": "step", "step": 0, "loss": 2.5, "tokens_per_s": 321.0, "entropy_ratios": [0.9]},
            {"event": "evaluation", "step": 1, "domain": "code", "loss": 2.25},
            {"event": "published", "ref": "mode@v1/safetensors", "size_bytes": 5_000_000},
            {"event": "ended", "outcome": "succeeded"},
        )
        waits = []

        def meanwhile(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                cluster.end_job(f"{id}.1")
            built.jobs.step()

        get, failures = ControlClient.get, [Unavailable("restarting")]

        def sometimes(self: ControlClient, path: str, **params: object) -> object:
            if "/events" in path and len(waits) == 1 and failures:
                raise failures.pop()
            return get(self, path, **params)

        monkeypatch.setattr(following.time, "sleep", meanwhile)
        monkeypatch.setattr(ControlClient, "get", sometimes)
        shown = zenray("run", str(job_file), "--follow")
        for words in ("321 tokens/s", "held-out code: loss 2.2500", "published mode@v1/safetensors (5 MB)"):
            assert shown.count(words) == 1, shown
        assert "grow succeeded." in shown and not failures
        assert "distill, 2 steps" in zenray("jobs", "show", "grow")

    def test_a_failed_one_says_why_and_how_to_go_on(
        self,
        zenray: Zenray,  # noqa: F811
        control: TestClient,  # noqa: F811
        job_file: Path,
        tmp_path: Path,
    ) -> None:
        built, cluster = parts(control)
        id = submitted(zenray, job_file)
        built.jobs.step()
        built.jobs.step()
        say(tmp_path, id, {"event": "ended", "outcome": "failed", "message": "dense@v3 has no tokenizer."})
        cluster.end_job(f"{id}.1", failure="exit code 1", logs="loading\nerror: dense@v3 has no tokenizer.\n")
        built.jobs.step()
        shown = zenray("jobs", "logs", "grow", "--follow", fails=True)
        assert "grow failed: dense@v3 has no tokenizer." in shown and "zenray jobs resume grow" in shown
        assert "loading" in zenray("jobs", "logs", "grow")
        assert "has no tokenizer" in zenray("jobs", "list")
        assert "is queued" in zenray("jobs", "resume", "grow")
        assert "is cancelled" in zenray("jobs", "cancel", "grow")
        assert "grow cancelled: " in zenray("jobs", "logs", id, "--follow", fails=True)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("jobs", "show", "grwo"), "grow"),
            (("jobs", "cancel", "grwo"), "grow"),
            (("jobs", "logs", "grwo"), "grow"),
            (("jobs", "resume", "grow"), ""),
        ],
    )
    def test_an_unknown_name_suggests_the_nearest(
        self,
        zenray: Zenray,  # noqa: F811
        job_file: Path,
        words: tuple[str, ...],
        said: str,
    ) -> None:
        zenray("run", str(job_file))
        assert said in zenray(*words, fails=bool(said))

    def test_a_base_that_is_not_there_is_refused_before_anything_is_recorded(
        self,
        zenray: Zenray,  # noqa: F811
        job_file: Path,
    ) -> None:
        job_file.write_text(JOB.replace("dense}", "dense, version: v4}"))
        assert "v3/safetensors" in zenray("run", str(job_file), fails=True)
        assert json.loads(zenray("jobs", "list", "--json")) == []


def test_a_job_s_run_time_ends_with_it() -> None:
    queued = {"started_at": None, "ended_at": None}
    assert run_time(queued, now=1000.0) is None
    assert run_time(queued | {"started_at": 100.0}, now=1000.0) == "15 min"
    assert run_time({"started_at": 100.0, "ended_at": 130.0}, now=1000.0) == "30 s"


SCRIPT = """
import sys
from zenray.spec.platform import StorageSettings
from zenray.storage.job_record import job_journal, read_recorded_job
from zenray.storage.opening import open_store
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
store = open_store(StorageSettings(uri=options["--store"]))
assert read_recorded_job(store, options["--job"]).base.version == "v3"
journal = job_journal(store, options["--job"])
journal.append([{"event": "published", "ref": "mode@v1/safetensors"}])
journal.append([{"event": "ended", "outcome": OUTCOME, "message": "the disk is full"}])
print("bytes and bytes")
raise SystemExit(OUTCOME == "failed")
"""


@pytest.mark.parametrize("outcome", ["succeeded", "failed"])
def test_without_a_platform_it_runs_in_the_foreground_with_the_same_events(
    outcome: str,
    zenray: Zenray,  # noqa: F811
    job_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = tmp_path / "training.py"
    script.write_text(SCRIPT.replace("OUTCOME", repr(outcome)))
    popen = runs.subprocess.Popen
    monkeypatch.setattr(runs.time, "sleep", lambda seconds: select.select([], [], [], 0.01))  # for the child's sake
    monkeypatch.setattr(
        runs.subprocess, "Popen", lambda command, **how: popen([sys.executable, str(script), *command[3:]], **how)
    )
    shown = zenray("run", str(job_file), fails=outcome == "failed")
    assert "No platform runs" in shown and "published mode@v1/safetensors" in shown
    assert ("grow succeeded." in shown) is (outcome == "succeeded")
    if outcome == "failed":
        assert "grow failed: the disk is full" in shown and "Run it again to go on" in shown
    (log,) = (tmp_path / "home" / "logs" / "jobs").glob("grow-*.log")
    assert log.read_text() == "bytes and bytes\n"


def test_the_corpus_is_written_with_labels(zenray: Zenray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    texts = {"code": ["x = 1"], "prose": ["It was.", "It is."], "mathematics": ["1 + 1"]}
    monkeypatch.setattr("zenray.training.data.documents.builtin_documents", lambda name: iter(texts[name]))
    rows = json.loads(zenray("data", str(tmp_path / "corpus"), "--json"))
    assert {row["domain"]: row["documents"] for row in rows} == {"code": 1, "prose": 2, "mathematics": 1}
    lines = (tmp_path / "corpus" / "prose.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"text": "It is.", "domain": "prose"}
    assert "prose.jsonl" in zenray("data", str(tmp_path / "corpus"))
