"""What a step is measured by, and where the measurements go."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.tiny import CONFIG, job
from zenray.catalog.accounting import flops_per_token
from zenray.model.balance import RouterStats
from zenray.model.config import ExpertGroup
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue
from zenray.spec.training import PretrainJob
from zenray.training import metrics
from zenray.training.data.stream import pack
from zenray.training.mesh import Mesh
from zenray.training.metrics import StepMeasures, peak_flops
from zenray.training.routing import StepRouting
from zenray.training.tracking import check_trackers, metrics_of, tracked
from zenray.training.trainer import Trainer

STEP = {"event": "step", "step": 4, "loss": 2.5, "tokens_per_s": 100.0}


def test_a_step_is_told_with_what_it_cost() -> None:
    told: list[dict[str, Any]] = []
    measures = StepMeasures(told.append, CONFIG, context_tokens=16)
    measures({"event": "checkpoint", "step": 1})
    measures(dict(STEP))
    assert told[0] == {"event": "checkpoint", "step": 1}
    assert told[1].items() >= STEP.items()
    assert told[1]["memory_bytes"] > 50 << 20 and told[1]["communication_share"] == 0.0
    assert told[1]["mfu"] is None, "nobody knows what a CPU could do at most"


def test_time_in_collectives_is_counted_and_the_functions_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: float(next(now)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    called: list[str] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: called.append(tensor))
    real = torch.distributed.all_reduce
    told: list[dict[str, Any]] = []
    measures = StepMeasures(told.append, CONFIG, context_tokens=16)  # at 0
    with measures.watching_collectives():
        torch.distributed.all_reduce("first")  # 1 to 2
        torch.distributed.all_reduce("second")  # 3 to 4
    measures(dict(STEP))  # at 5
    assert told[0]["communication_share"] == pytest.approx(2 / 5)
    assert called == ["first", "second"] and torch.distributed.all_reduce is real


def test_the_wait_for_a_collective_that_was_only_started_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(torch.distributed.Work):
        pass

    now = iter(range(1000))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: float(next(now)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed.Work, "wait", lambda work: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda: Started())
    told: list[dict[str, Any]] = []
    measures = StepMeasures(told.append, CONFIG, context_tokens=16)  # at 0
    with measures.watching_collectives():
        work = torch.distributed.all_reduce()  # 1 to 2
        work.wait()  # 3 to 4
        Started().wait()  # somebody else's
    measures(dict(STEP))  # at 5
    assert told[0]["communication_share"] == pytest.approx(2 / 5)


def test_utilisation_is_of_the_hardwares_peak_over_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    for name, peak in {"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A10": 125e12, "NVIDIA A10G": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert peak_flops() == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    told: list[dict[str, Any]] = []
    StepMeasures(told.append, CONFIG, [CONFIG], context_tokens=16, world=2)(dict(STEP))
    forward = flops_per_token(CONFIG.dimensions(), 16)
    assert told[0]["mfu"] == pytest.approx(4 * forward * 100.0 / (2 * 989e12)), (
        "three forward passes, and the teacher's"
    )
    assert told[0]["memory_bytes"] == 7 and told[0]["communication_share"] is None


def test_utilisation_counts_experts_of_other_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "peak_flops", lambda: 1e9)
    groups = (*CONFIG.expert_groups, ExpertGroup("reason", 1, 2 * CONFIG.head_dim * CONFIG.num_key_value_heads, "deep"))
    with_block = replace(CONFIG, expert_groups=groups)
    told: list[dict[str, Any]] = []
    StepMeasures(told.append, with_block, context_tokens=16)(dict(STEP))
    assert told[0]["mfu"] == pytest.approx(3 * flops_per_token(with_block.dimensions(), 16) * 100.0 / 1e9)


def test_what_experts_had_no_room_for_is_counted_by_layer_over_passes() -> None:
    def stats(dropped: float, fallback: float) -> RouterStats:
        one = torch.ones(4)
        return RouterStats(one, one, torch.zeros(()), torch.tensor(8.0), one * dropped, torch.tensor(fallback))

    without_capacity = stats(0, 0)._replace(overflow_E=None, fallback_tokens=None)
    model = MoDE(replace(CONFIG, num_hidden_layers=4, sparse_layers=(0, 2, 3)))
    routing = StepRouting(model, Mesh())
    routing.loss([stats(1, 2), without_capacity, stats(0, 0)], 16)
    routing.loss([stats(2, 3), without_capacity, stats(0, 1)], 16)
    layers = routing.report()
    assert [(layer.dropped_choices, layer.fallback_tokens) for layer in layers] == [(12, 5), (0, 0), (0, 1)]
    assert [layer.load.load for layer in layers] == [(0.25,) * 4] * 3


def test_a_step_says_of_each_layer_how_even_it_was_and_what_it_had_no_room_for(tmp_path: Path) -> None:
    """Half of the room that even loads need: at least half of all choices are dropped."""
    tight = replace(CONFIG.router, capacity_factor=0.5)
    torch.manual_seed(0)
    model = MoDE(replace(CONFIG, router=tight, shared_expert_width=8, num_hidden_layers=3, sparse_layers=(1, 2)))
    tokens = torch.randint(0, 256, (4, 33)).numpy()
    report = Trainer(model, wanted(tmp_path)).step(0, [pack([(row, row * 0) for row in tokens])])
    choices = 4 * 32 * 2
    for dropped, fallback in zip(report.dropped_choices, report.fallback_tokens, strict=True):
        assert choices / 2 <= dropped < choices and dropped / 2 <= fallback <= 4 * 32
    for entropy, effective, load in zip(report.entropy_ratios, report.effective_ratios, report.loads, strict=True):
        assert effective == pytest.approx(len(load) ** (entropy - 1)) and entropy < 1
    assert len(report.loads) == 2


def test_waiting_for_other_stages_is_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, waited_s, told = [0.0], [5.0], []  # some waiting was before the first step
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now_s[0])
    monkeypatch.setattr(metrics.dist, "is_initialized", lambda: True)
    measures = StepMeasures(told.append, CONFIG, context_tokens=16, of_pipeline=lambda: waited_s[0])
    for now_s[0], waited_s[0] in ((4.0, 6.0), (8.0, 9.0)):
        measures(dict(STEP))
    assert [event["communication_share"] for event in told] == [0.25, 0.75]


def test_an_events_metrics_have_names_and_are_finite() -> None:
    about = {"gradient_norms": {"expert": 1.5}, "entropy_ratios": [0.9], "loads": [[0.25, 0.75]], "kl": "nan"}
    about |= {"effective_ratios": [0.8, 0.7], "fallback_tokens": [0, 5]}
    found, step = metrics_of({**STEP, **about})
    assert step == 5 and found["loss"] == 2.5 and "kl" not in found and "mfu" not in found
    assert found["effective_ratio/layer_1"] == 0.7 and found["fallback_tokens/layer_1"] == 5
    assert found["gradient_norm/expert"] == 1.5 and found["load/layer_0/expert_1"] == 0.75
    assert metrics_of({"event": "evaluation", "step": 3, "domain": "code", "loss": 1.0}) == (
        {"validation_loss/code": 1.0},
        3,
    )
    assert metrics_of({"event": "checkpoint", "step": 3}) == ({}, 0)


def wanted(tmp_path: Path, **tracking: Any) -> PretrainJob:
    made = job({"count": tmp_path}, tracking=tracking)
    assert isinstance(made, PretrainJob)
    return made


class FakeMlflow(types.ModuleType):
    """MLflow's client as far as it is used: experiments and runs in memory."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: dict[str, dict[str, Any]] = {}
        self.MlflowClient = lambda tracking_uri: self
        self.entities = types.ModuleType("mlflow.entities")
        self.entities.Metric = lambda *of: of  # type: ignore[attr-defined]
        self.entities.Param = lambda *of: of  # type: ignore[attr-defined]
        self.is_away = False

    def get_experiment_by_name(self, name: str) -> Any:
        if self.is_away:
            raise ConnectionError("no route")

    def create_experiment(self, name: str) -> str:
        return name

    def search_runs(self, experiments: list[str], filter_string: str, max_results: int) -> list[Any]:
        found = [id for id, run in self.runs.items() if f"'{run['tags']['zenray.run']}'" in filter_string]
        return [SimpleNamespace(info=SimpleNamespace(run_id=id)) for id in found]

    def create_run(self, experiment: str, tags: dict[str, str]) -> Any:
        id = f"run-{len(self.runs)}"
        self.runs[id] = {"tags": tags, "experiment": experiment, "params": {}, "metrics": []}
        return SimpleNamespace(info=SimpleNamespace(run_id=id))

    def log_batch(self, id: str, metrics: Sequence[Any] = (), params: Sequence[Any] = ()) -> None:
        if self.is_away:
            raise ConnectionError("no route")
        assert len(metrics) <= 1000, "the server refuses more"
        self.runs[id]["params"] |= dict(params)
        self.runs[id]["metrics"] += [(name, value, step) for name, value, _, step in metrics]

    def set_terminated(self, id: str) -> None:
        if self.is_away:
            raise ConnectionError("no route")
        self.runs[id]["ended"] = True


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[types.ModuleType], None]]:
    def install(module: types.ModuleType) -> None:
        module.__spec__ = SimpleNamespace(name=module.__name__)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if isinstance(module, FakeMlflow):
            monkeypatch.setitem(sys.modules, "mlflow.entities", module.entities)

    yield install


def test_mlflow_gets_each_step_and_a_run_goes_on_in_its_run(tmp_path: Path, installed: Any) -> None:
    mlflow = FakeMlflow()
    installed(mlflow)
    asked = wanted(tmp_path, mlflow={"uri": "file:/runs", "experiment": "mode"})
    check_trackers(asked)
    for step in (4, 5):
        with tracked(asked, "tiny-1") as tell:
            tell({**STEP, "step": step})
            tell({"event": "checkpoint", "step": step})
    (run,) = mlflow.runs.values()
    assert [(name, step) for name, _, step in run["metrics"] if name == "loss"] == [("loss", 5), ("loss", 6)]
    assert run["experiment"] == "mode" and run["params"]["steps"] == "6" and run["ended"]
    with tracked(asked, "tiny-1") as tell:
        tell({**STEP, "loads": [[0.0] * 1500]})
    assert len([name for name, *_ in run["metrics"] if name.startswith("load/")]) == 1500


@pytest.mark.parametrize("goes_away", ["before it is opened", "before a step", "before it is closed"])
def test_a_tracker_that_is_away_is_said_once_and_the_run_goes_on(
    tmp_path: Path, installed: Any, caplog: pytest.LogCaptureFixture, goes_away: str
) -> None:
    mlflow = FakeMlflow()
    installed(mlflow)
    mlflow.is_away = goes_away == "before it is opened"
    with tracked(wanted(tmp_path, mlflow={"uri": "file:/runs"}), "tiny-1") as tell:
        mlflow.is_away |= goes_away == "before a step"
        tell(STEP)
        tell(STEP)
        mlflow.is_away = True
    assert caplog.text.count("no route") == 1


def test_wandb_gets_each_step(tmp_path: Path, installed: Any) -> None:
    wandb, logged = types.ModuleType("wandb"), []
    opened = SimpleNamespace(log=lambda metrics, step: logged.append((metrics["loss"], step)), finish=lambda: None)
    seen: dict[str, Any] = {}
    wandb.init = lambda **how: (seen.update(how), opened)[1]  # type: ignore[attr-defined]
    installed(wandb)
    with tracked(wanted(tmp_path, wandb={"project": "mode", "mode": "offline"}), "tiny-1") as tell:
        tell(STEP)
    assert logged == [(2.5, 5)]
    assert (seen["project"], seen["id"], seen["resume"], seen["mode"]) == ("mode", "tiny-1", "allow", "offline")


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(wanted(tmp_path))
    with pytest.raises(InvalidValue, match=r"mlflow and wandb.*zenray\[tracking\]"):
        check_trackers(wanted(tmp_path, mlflow={"uri": "file:/runs"}, wandb={"project": "mode"}))
