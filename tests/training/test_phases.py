"""A pipeline on a tiny dense model: each phase once, whatever happens in between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import WorkerCrashedError
from transformers import LlamaConfig, LlamaForCausalLM

from tests.training.tiny import END, write_text, write_version
from zenray.spec.errors import Conflict, InvalidValue, StorageUnavailable, ZenrayError
from zenray.spec.evaluation import EvaluateJob, EvaluationResult
from zenray.spec.jobs import PipelineJob, job_id
from zenray.spec.platform import StorageSettings
from zenray.spec.versions import VersionRef
from zenray.storage.job_record import job_journal, read_result
from zenray.storage.local import LocalStore
from zenray.storage.pinning import pin
from zenray.storage.versions import find_manifest, publish, read_manifest
from zenray.training import evaluate as evaluation
from zenray.training import evaluate_task
from zenray.training.__main__ import main
from zenray.training.events import EventPlace, EventStream
from zenray.training.phases import carry_out


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=END + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=8,
        eos_token_id=END,
        bos_token_id=END,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    other = write_version(tmp_path_factory.mktemp("tokenizer") / "tiny")
    shutil.copy(other / "tokenizer.json", folder / "tokenizer.json")
    return folder


class Place:
    """A store with the dense version, text, and the pipeline."""

    def __init__(self, folder: Path, dense: Path) -> None:
        self.folder = folder
        self.store = LocalStore(folder / "store")
        publish(self.store, VersionRef(model="dense", version="v0"), dense)
        self.text = write_text(folder / "text")

    def job(self, *, gpu: bool = False, **conditions: Any) -> PipelineJob:
        sources = [{"domain": domain, "path": str(path)} for domain, path in self.text.items()]
        data = {"sources": sources, "sequence_tokens": 32, "validation_share": 0.2}
        mode = {"model": "mode", "version": "v1"}
        phases = [
            {
                "kind": "upcycle",
                "name": "grow",
                "base": {"model": "dense"},
                "into": mode,
                "groups": [{"name": "general", "experts": 2}],
            },
            {"kind": "evaluate", "name": "measure", "version": mode, "text": data, "sequences": 4, "gpu": gpu},
            {
                "kind": "publish",
                "name": "release",
                "version": mode,
                "into": {"model": "served", "version": "v1"},
                **conditions,
            },
        ]
        return PipelineJob.model_validate({"kind": "pipeline", "name": "all", "phases": phases})

    def run(self, job: PipelineJob) -> None:
        with EventStream(self.store, EventPlace("all")) as tell:
            carry_out(pin(job, self.store), StorageSettings(uri=self.store.uri), self.folder / "work", tell)

    def events(self) -> list[dict[str, Any]]:
        return job_journal(self.store, "all").read(0)[0]

    def phases(self) -> list[tuple[str, str]]:
        return [(event["name"], event["state"]) for event in self.events() if event["event"] == "phase"]


@pytest.fixture
def place(tmp_path: Path, dense: Path) -> Place:
    return Place(tmp_path, dense)


def test_each_phase_is_done_once_and_the_result_is_published(place: Place) -> None:
    job = place.job(largest_perplexity={"count": 1000.0})
    place.run(job)
    assert place.phases() == [(n, s) for n in ("grow", "measure", "release") for s in ("started", "done")]
    assert [e["ref"] for e in place.events() if e["event"] == "published"] == [
        "mode@v1/safetensors",
        "mode@v1/mixtral",
        "served@v1/safetensors",
    ]
    assert {e["phase"] for e in place.events() if e["event"] == "published"} == {"grow", "release"}
    served = read_manifest(place.store, VersionRef(model="served", version="v1"))
    grown = read_manifest(place.store, VersionRef(model="mode", version="v1"))
    assert served.files == grown.files and served.parents.base_version == "mode@v1/safetensors"
    stock = [
        read_manifest(place.store, VersionRef(model=m, version="v1", format="mixtral")) for m in ("mode", "served")
    ]
    assert stock[0].files == stock[1].files, "in every format that it has"
    result = read_result(place.store, job_id(pin(job.phases[1], place.store)))
    assert result is not None and result.version == "mode@v1/safetensors"

    left = Path(place.store.uri.removeprefix("file:"), "training", job_id(pin(job.phases[0], place.store)))
    left.mkdir(parents=True)  # as a phase leaves it that was killed between publishing and clearing up
    place.run(job)
    assert not left.exists()
    assert place.phases()[6:] == [("grow", "skipped"), ("measure", "skipped"), ("release", "skipped")]


def test_one_that_was_killed_goes_on_where_it_stood(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise StorageUnavailable("the store is away")

    real = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", away)
    with pytest.raises(StorageUnavailable):
        place.run(place.job())
    before = find_manifest(place.store, VersionRef(model="mode", version="v1"))
    monkeypatch.setattr(evaluation, "evaluate", real)
    place.run(place.job())
    assert place.phases() == [
        ("grow", "started"),
        ("grow", "done"),
        ("measure", "started"),
        ("grow", "skipped"),
        ("measure", "started"),
        ("measure", "done"),
        ("release", "started"),
        ("release", "done"),
    ]
    assert find_manifest(place.store, VersionRef(model="mode", version="v1")) == before


def test_an_evaluation_on_a_gpu_is_a_task_that_asks_for_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def in_task(job: EvaluateJob, *about: object, **how: Any) -> EvaluationResult:
        asked.append(how)
        return EvaluationResult(version="mode@v1/safetensors")

    monkeypatch.setattr(evaluate_task, "evaluate_in_task", in_task)
    place.run(place.job(gpu=True))
    assert asked == [{"gpus": 1}]


def test_a_gpu_is_not_waited_for_where_none_can_come(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_task, "connect", lambda: None)
    monkeypatch.setattr(evaluate_task, "can_grow", lambda: False)
    monkeypatch.setattr(evaluate_task, "machines_of_cluster", lambda: [{"CPU": 2.0}])
    with pytest.raises(InvalidValue, match="measure is to run on a GPU, and this machine has none"):
        place.run(place.job(gpu=True))


class OneTask:
    """Ray, with a task that runs when it is asked about, or dies."""

    def __init__(self, dies: bool = False) -> None:
        self.options: dict[str, Any] = {}
        self.dies = dies

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def remote(self, **options: Any) -> Any:
        self.options = options
        return lambda task: SimpleNamespace(remote=partial(partial, task))

    def get(self, task: Callable[[], Any]) -> Any:
        if self.dies:
            raise WorkerCrashedError
        return task()


def test_a_task_says_what_it_waits_for_and_needs_no_files_of_questions(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "quiz.jsonl"
    path.write_text('{"question": "Is it?", "choices": ["no", "yes"], "answer": 1}')
    about = {"kind": "evaluate", "name": "measure", "version": {"model": "mode"}, "gpu": True}
    job = EvaluateJob(**about, choices=[{"name": "quiz", "path": str(path)}])  # type: ignore[arg-type]
    result, asked = EvaluationResult(version="mode@v1/safetensors"), []
    monkeypatch.setattr(evaluate_task, "connect", path.unlink)
    monkeypatch.setattr(evaluate_task, "can_grow", lambda: True)
    monkeypatch.setattr(evaluate_task, "evaluate", lambda *given, device: asked.append((given[-1], device)) or result)
    storage = StorageSettings(uri=place.store.uri)
    with EventStream(place.store, EventPlace("a", "measure")) as tell:
        ray = OneTask()
        monkeypatch.setattr(evaluate_task, "ray", ray)
        assert evaluate_task.evaluate_in_task(job, storage, tmp_path, tell, gpus=1) == result
        assert ray.options == {"num_cpus": 1, "num_gpus": 1, "max_retries": 0}
        path.write_text('{"question": "Is it?", "choices": ["no", "yes"], "answer": 1}')
        monkeypatch.setattr(evaluate_task, "ray", OneTask(dies=True))
        with pytest.raises(ZenrayError, match="measure died: The worker died unexpectedly"):
            evaluate_task.evaluate_in_task(job, storage, tmp_path, tell, gpus=1)
    ((questions, device),) = asked
    assert [one.answer for one in questions["quiz"]] == [1] and device.type == "cuda"
    told, _ = job_journal(place.store, "a").read(0)
    lacking = "they need 1 × 1 CPU and 1 GPU, and 2 CPU and 0 GPU is free"
    assert sorted(str(event["missing"]) for event in told) == ["None", lacking, lacking]


def test_what_is_not_good_enough_is_not_published(place: Place) -> None:
    with pytest.raises(ZenrayError, match=r"perplexity of count is \d+\.\d+, not at most 1\.5"):
        place.run(place.job(largest_perplexity={"count": 1.5}))
    with pytest.raises(ZenrayError, match="accuracy of quiz is unknown"):
        place.run(place.job(least_accuracy={"quiz": 0.5}))
    assert find_manifest(place.store, VersionRef(model="served", version="v1")) is None


def test_a_version_of_another_job_is_never_taken_for_ones_own(place: Place, dense: Path) -> None:
    publish(place.store, VersionRef(model="served", version="v1"), dense)
    with pytest.raises(Conflict, match="not made by this job"):
        place.run(place.job())


def test_events_are_also_on_this_machine_at_once(tmp_path: Path, place: Place) -> None:
    kept = tmp_path / "kept" / "events.jsonl"
    with EventStream(place.store, EventPlace("a", "one"), keep=kept) as tell:
        tell({"event": "step", "step": 1})
        assert json.loads(kept.read_text())["step"] == 1
        tell.in_phase("two")({"event": "step", "step": 2})
    records, _ = job_journal(place.store, "a").read(0)
    assert [(record["phase"], record["step"]) for record in records] == [("one", 1), ("two", 2)]
    with EventStream(place.store, EventPlace("a"), is_silent=True) as silent:
        silent({"event": "step", "step": 3})
    assert job_journal(place.store, "a").read(0)[0] == records


def test_the_command_runs_a_file_and_says_what_it_did(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    job = place.job().phases[0]
    file = place.folder / "job.json"  # which is YAML too
    file.write_text(job.model_dump_json())
    arguments = [str(file), "--store", place.store.uri, "--work-dir", str(place.folder / "work")]
    assert main(arguments) == 0
    assert "published mode@v1/safetensors" in capsys.readouterr().out
    records, _ = job_journal(place.store, job_id(pin(job, place.store))).read(0)
    assert records[-1]["event"] == "ended" and records[-1]["outcome"] == "succeeded"
    file.write_text(job.model_dump_json().replace('"drop_rate":null', '"drop_rate":0.25'))
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert "error: " in shown.err and "failed: mode@v1" in shown.out, "its last event says why"
    assert main(["--job", "gone", *arguments[1:]]) == 1
