"""Speculative decoding on real vLLM: a draft whose weights come from the store, and guesses looked up in the text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.backend_contract import Harness
from tests.cluster.ray_session import RaySession
from tests.cluster.scripted_apps import AUTHORIZED
from tests.serving.tiny_model import make_tiny_model
from zenray.spec.deployments import DeploymentSpec, EngineSettings
from zenray.storage.opening import open_store
from zenray.storage.versions import publish

pytestmark = [pytest.mark.contract, pytest.mark.nightly]

ENGINE = {"dtype": "float32", "max_model_len": 256, "kv_cache_bytes": 1 << 26}
DRAFTS = {"plain": None, "drafted": {"model": "tiny", "version": "v1", "tokens": 3}, "looked-up": {"tokens": 3}}


@pytest.fixture(scope="module")
def harness(ray_session: RaySession) -> Harness:
    return Harness(ray_session.cluster, ray_session.publisher, pause=time.sleep)


def test_guesses_are_accepted_and_change_no_text(harness: Harness, tmp_path: Path) -> None:
    """A model that drafts for itself: greedy text is the same, and nearly every guess is taken."""
    make_tiny_model(tmp_path)
    publisher = harness.publisher
    spec = DeploymentSpec(model="tiny", version="v1", graceful_shutdown_timeout_s=1)
    publish(open_store(publisher.storage), spec.ref(), tmp_path)
    texts: dict[str, str] = {}
    for name, draft in DRAFTS.items():
        engine = EngineSettings.model_validate(ENGINE | {"draft": draft})
        app = publisher.serving(spec.model_copy(update={"engine": engine}))
        harness.cluster.apply([app])
        harness.until(lambda s, name=app.name: set(s.applications) == {name}, within_s=180)
        status = harness.until(lambda s, name=app.name: bool(s.applications[name].replica_urls), within_s=200)
        (url,) = status.applications[app.name].replica_urls.values()
        with httpx.Client(base_url=url, headers=AUTHORIZED, timeout=120) as replica:
            body: dict[str, Any] = {"prompt": "one two three one two three one two", "max_tokens": 48, "temperature": 0}
            texts[name] = replica.post("/v1/completions", json=body).json()["choices"][0]["text"]
            guessed, accepted = counters(replica.get("/metrics").text)
        print(f"{name}: {accepted} of {guessed} guesses accepted")
        assert bool(guessed) == (draft is not None)
        if name == "drafted":
            assert accepted > 0.8 * guessed
    assert texts["drafted"] == texts["looked-up"] == texts["plain"] != ""
    harness.cluster.apply([])


def counters(metrics: str) -> tuple[float, float]:
    """(guessed, accepted) tokens so far."""

    def total(name: str) -> float:
        values = [float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(f"{name}{{")]
        return sum(values)

    return (
        total("vllm:spec_decode_num_draft_tokens_total"),
        total("vllm:spec_decode_num_accepted_tokens_total"),
    )
