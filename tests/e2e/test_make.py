"""From a dense model to a mixture of experts that answers: `zenray run`, `zenray deploy`, a question."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.platform import TestPlatform

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]  # a second engine: too much beside the first on two cores
JOB = Path(__file__).parents[2] / "jobs" / "upcycle-smollm2.yaml"


def test_an_upcycled_model_is_published_deployed_and_answers(platform: TestPlatform) -> None:
    platform.zenray("run", str(JOB), "--follow")
    spec = platform.home.root / "mode.yaml"
    spec.write_text(
        "model: smollm2-mode\n"  # its own format, through our vLLM model
        "engine: {dtype: float32, max_model_len: 512, max_num_seqs: 4, kv_cache_bytes: 134217728}\n"
    )
    platform.zenray("deploy", str(spec), timeout_s=600)
    client = platform.customer("maker")
    answer = client.chat.completions.create(
        model="smollm2-mode",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=32,
        temperature=0,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    platform.zenray("undeploy", "smollm2-mode")
