"""The dashboards for Grafana name only what exists."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from zenray.control.edge.routes import EdgeCounters
from zenray.gateway.metrics import Metrics
from zenray.serving.replica_metrics import ReplicaMetrics

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
FILES = sorted(FOLDER.glob("*.json"))
_NAME = re.compile(r"\b(zenray_[a-z_]+|ray_zenray_[a-z_]+|vllm:[a-z_]+)")
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
    return {one._name: set(one._labelnames) for one in metrics} | gauges


def of_vllm() -> str:
    found = importlib.util.find_spec("vllm")  # the package itself takes seconds to import
    assert found is not None and found.submodule_search_locations is not None
    return (Path(found.submodule_search_locations[0]) / "v1/metrics/loggers.py").read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_metric_and_label_exists(file: Path) -> None:
    board, known, vllm = json.loads(file.read_text()), ours(), of_vllm()
    found = 0
    for expression in expressions(board):
        names = [_SUFFIX.sub("", name) for name in _NAME.findall(expression)]
        assert names, expression
        labels = {"le", "instance"}
        for name in names:
            found += 1
            if name.startswith("vllm:"):
                assert f'"{name}"' in vllm, name
                labels.add("model_name")
            else:
                assert name in known, name
                labels |= known[name]
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
