"""Prometheus gauges that are read from the database when somebody scrapes."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from zenray.control.api.deployments import deployment_row
from zenray.control.db.engine import Database
from zenray.control.db.published import current_version
from zenray.control.deployments.repository import load_all
from zenray.control.edge.leases import list_gateways
from zenray.spec.clock import Clock
from zenray.spec.deployments import DeploymentState


class DatabaseGauges(Collector):
    """Deployments by state, replicas, gateways, the snapshot's version. While the database is away, only that."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def describe(self) -> Iterable[Metric]:
        return []  # so that registering does not read the database

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("zenray_database_up", "1 if the database answers.")
        try:
            found = list(self._read())
        except SQLAlchemyError:
            up.add_metric([], 0)
            return [up]
        up.add_metric([], 1)
        return [up, *found]

    def _read(self) -> Iterable[Metric]:
        state = GaugeMetricFamily("zenray_deployment_state", "1 for the state it is in.", labels=["model", "state"])
        replicas = GaugeMetricFamily("zenray_deployment_replicas", "Replicas that gateways may ask.", labels=["model"])
        seen = GaugeMetricFamily("zenray_gateway_seen_seconds", "Seconds since it was heard of.", labels=["gateway"])
        held = GaugeMetricFamily("zenray_gateway_held_nano_usd", "Nano-USD lent to it.", labels=["gateway"])
        version = GaugeMetricFamily("zenray_snapshot_version", "Version of what gateways are told.")
        now = self._clock.now()
        with self._database.read() as session:
            for loaded in load_all(session):
                row = deployment_row(loaded)
                for each in DeploymentState:
                    state.add_metric([row.model, each.value], float(row.state == each))
                replicas.add_metric([row.model], row.replicas)
            for gateway, amount in list_gateways(session):
                seen.add_metric([gateway.gateway_id], max(0.0, now - gateway.last_seen_at))
                held.add_metric([gateway.gateway_id], amount)
            version.add_metric([], current_version(session))
        return [state, replicas, seen, held, version]
