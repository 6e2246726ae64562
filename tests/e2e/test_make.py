"""From a dense model to a mixture of experts that answers: `zenray run`, `zenray deploy`, a question."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.e2e.platform import TestPlatform
from zenray.spec.platform import StorageSettings
from zenray.spec.versions import VersionRef
from zenray.storage.opening import open_store
from zenray.storage.versions import read_manifest

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]  # a second engine: too much beside the first on two cores
JOBS = Path(__file__).parents[2] / "jobs"
QUESTION = "What is the capital of France?"


def test_an_upcycled_model_is_published_deployed_and_answers(platform: TestPlatform) -> None:
    platform.zenray("run", str(JOBS / "upcycle-smollm2.yaml"), "--follow")
    assert "Paris" in answer_of(platform, "maker")


@pytest.mark.timeout(3600)
def test_a_distilled_model_is_balanced_published_deployed_and_answers(platform: TestPlatform) -> None:
    """The whole recipe, by two workers: experts evenly loaded in every layer, the student past its teacher."""
    platform.zenray("run", str(JOBS / "upcycle-smollm2.yaml"), "--follow")
    begun_at = time.monotonic()
    shown = platform.zenray("run", str(JOBS / "distill-smollm2-mode.yaml"), "--follow", timeout_s=3000)
    assert "published smollm2-mode@v2" in shown, shown
    store = open_store(StorageSettings(uri=f"file:{platform.home.root / 'store'}"))
    about = read_manifest(store, VersionRef(model="smollm2-mode", version="v2")).metadata
    evenness, validation = json.loads(about["entropy_ratios"]), json.loads(about["validation"])
    print(f"distilled in {time.monotonic() - begun_at:,.0f} s", shown[-2000:], evenness, validation)
    assert min(evenness) > 0.95, evenness
    for domain, found in validation.items():
        before, after = found["before"]["loss"], found["after"]["loss"]
        # It begins further from the text than its teacher, and ends nearer: it has read text of these very domains.
        assert after < found["teacher"] < before, (domain, found)
    assert answer_of(platform, "distiller", version="v2")


def answer_of(platform: TestPlatform, org: str, **deployed: str) -> str:
    """What the mixture says, once it is deployed in its own format, through our vLLM model."""
    spec = platform.home.root / f"{org}.yaml"
    engine = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 4, "kv_cache_bytes": 134217728}
    spec.write_text(json.dumps({"model": "smollm2-mode", **deployed, "engine": engine}))
    platform.zenray("deploy", str(spec), timeout_s=600)
    answer = platform.customer(org).chat.completions.create(
        model="smollm2-mode",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=32,
        temperature=0,
    )
    platform.zenray("undeploy", "smollm2-mode")
    return answer.choices[0].message.content or ""
