"""A Ray head that dies while it starts: tried once more, then said with the end of its log."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from zenray.cluster.head import LocalRay
from zenray.spec.errors import ClusterUnavailable
from zenray.spec.platform import RaySettings


class DyingRay(LocalRay):
    """Its command writes a line and ends."""

    tries = 0

    def _command(self, ports: dict[str, int], temp_dir: Path) -> list[str]:
        self.tries += 1
        return [sys.executable, "-c", f"print('raylet did not answer, try {self.tries}'); raise SystemExit(3)"]


def test_it_is_tried_once_more_and_then_the_end_of_its_log_is_shown(tmp_path: Path) -> None:
    ray = DyingRay(tmp_path, RaySettings(gcs_port=0, dashboard_port=0, serve_port=0))
    with pytest.raises(ClusterUnavailable, match="raylet did not answer, try 2"):
        ray.start()
    assert ray.tries == 2
    assert ray.end_remains() == 0, "nothing is left of it"
