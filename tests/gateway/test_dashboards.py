"""The dashboards for Grafana name only what exists."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from zenray.control.edge.routes import EdgeCounters
from zenray.gateway.metrics import Metrics
from zenray.serving.policy_metrics import PolicyMetrics
from zenray.serving.replica_metrics import ReplicaMetrics
from zenray.spec.documents import load_document
from zenray.spec.platform import Platform

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "deploy" / "grafana"
FILES = sorted(FOLDER.glob("*.json"))
_NAME = re.compile(r"\b((?:ray_)?zenray_[a-z_]+|ray_(?:vllm|serve)_[a-z_]+)")
_SUFFIX = re.compile(r"_(bucket|sum|count|total)$")


def expressions(board: dict[str, Any]) -> list[str]:
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return found + [one["query"]["query"] for one in board["templating"]["list"] if one["type"] == "query"]


def ours() -> dict[str, set[str]]:
    """Every metric of the gateway, of control and of replicas (under Ray's name for it), with its labels."""
    holders = (Metrics(), EdgeCounters(CollectorRegistry()))
    metrics = [one for holder in holders for one in vars(holder).values() if isinstance(one, MetricWrapperBase)]
    gauges: dict[str, set[str]] = {}

    def gauge(name: str, *, description: str, tag_keys: tuple[str, ...]) -> None:
        gauges["ray_" + name] = set(tag_keys)

    ReplicaMetrics("m", "1", "r", gauge)
    PolicyMetrics(gauge)
    return {one._name: set(one._labelnames) for one in metrics} | gauges


def source(package: str, file: str) -> str:
    found = importlib.util.find_spec(package)  # to import them takes seconds
    assert found is not None and found.submodule_search_locations is not None
    return (Path(found.submodule_search_locations[0]) / file).read_text()


def labels_of(name: str, known: dict[str, set[str]]) -> set[str]:
    """Of an existing metric, as Prometheus gets it: vLLM's and Serve's come through Ray, which puts `ray_` before."""
    if name.startswith("ray_vllm_"):
        assert "inter_token_latenc" not in name, "replicas do not tell Ray of each token (engine/vllm.py)"
        assert f'"vllm:{name.removeprefix("ray_vllm_")}"' in source("vllm", "v1/metrics/loggers.py"), name
        assert '"ReplicaId"' in source("vllm", "v1/metrics/ray_wrappers.py")
        return {"model_name", "engine", "ReplicaId"}
    if name.startswith("ray_serve_"):
        (tags,) = re.findall(
            rf'"{name.removeprefix("ray_")}",.*?tag_keys=\(([^)]*)\)',
            source("ray", "serve/_private/autoscaling_state.py"),
            re.DOTALL,
        )
        return set(re.findall(r'"(\w+)"', tags))
    assert name in known, name
    return known[name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_metric_and_label_exists(file: Path) -> None:
    board, known = json.loads(file.read_text()), ours()
    found = 0
    for expression in expressions(board):
        names = [_SUFFIX.sub("", name) for name in _NAME.findall(expression)]
        assert names, expression
        labels = {"le", "instance"}
        for name in names:
            found += 1
            labels |= labels_of(name, known)
        asked = re.findall(r"[{,](\w+)=~?\"", expression)
        asked += [label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")]
        assert set(asked) <= labels, expression
    assert found > 4


def test_every_metric_of_the_gateway_is_on_a_dashboard() -> None:
    shown = {
        _SUFFIX.sub("", name)
        for file in FILES
        for expression in expressions(json.loads(file.read_text()))
        for name in _NAME.findall(expression)
    }
    assert {name for name in ours() if name.startswith("zenray_gateway")} <= shown


def test_dashboards_have_names_of_their_own_and_panels_do_not_overlap() -> None:
    boards = [json.loads(file.read_text()) for file in FILES]
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == len(boards) >= 3
    for board in boards:
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
        assert len(set(places)) == len(places)
        assert all(panel["description"] for panel in board["panels"])


def test_prometheus_is_told_where_the_parts_listen() -> None:
    config = yaml.safe_load((REPOSITORY / "deploy" / "prometheus.yml").read_text())
    platform = load_document(REPOSITORY / "clusters" / "local.yaml", Platform)
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    for name, part in (("zenray-gateway", platform.gateway), ("zenray-control", platform.control)):
        assert jobs[name]["static_configs"] == [{"targets": [f"{part.host}:{part.port}"]}]
    (ray,) = jobs["ray"]["file_sd_configs"]
    assert ray["files"] == ["../.zenray/ray/ray/prom_metrics_service_discovery.json"]
