"""A teacher behind an endpoint: what a replica's own vLLM says of a text is what the same network says here."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tests.e2e.platform import REAL, TestPlatform
from tests.e2e.serving_load import endpoints
from zenray.model.distillation import IGNORED
from zenray.spec.training import TeacherEndpoint
from zenray.training.data.stream import pack
from zenray.training.networks import Checkpoint
from zenray.training.teachers import EndpointAnswers, NetworkAnswers

pytestmark = pytest.mark.e2e
COUNT = 20  # as many as vLLM gives unless it is told otherwise
TEXTS = (
    "The capital of France is Paris, which lies on the Seine.",
    "def add(one, other):\n    return one + other\n",
    "A prime has two divisors: one and",
)


@pytest.mark.timeout(900)  # the platform itself may start within it
def test_vllm_says_of_each_document_what_the_same_network_says_here(
    platform: TestPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = (platform.home.root / "store" / "zen" / REAL).glob("*/safetensors")
    teacher = Checkpoint.open(folder)
    encode = Tokenizer.from_file(str(teacher.tokenizer_file)).encode
    documents = [encode(text).ids for text in TEXTS]
    numbers = np.repeat(np.arange(len(documents)), [len(tokens) for tokens in documents])
    batch = pack([(np.concatenate(documents), numbers)])

    (row,) = platform.rows("SELECT application FROM deployment_revisions WHERE model = ? AND phase = 'serving'", REAL)
    monkeypatch.setenv("TEACHER_KEY", json.loads(row["application"])["runtime_env"]["env_vars"]["VLLM_API_KEY"])
    (replica_url,) = endpoints(platform, REAL)
    endpoint = TeacherEndpoint(base_url=f"{replica_url}/v1", model=REAL, key_from="TEACHER_KEY")
    there = EndpointAnswers(endpoint, COUNT, teacher.config.vocab_size)(batch)
    here = NetworkAnswers(teacher.network, COUNT, 1.0)(batch)

    counted = batch.labels_BS.flatten() != IGNORED
    assert counted.sum() == sum(len(tokens) - 1 for tokens in documents)
    torch.testing.assert_close(there.log_probs_TN[counted], here.log_probs_TN[counted], rtol=0, atol=1e-3)
    assert there.ids_TN[counted].tolist() == here.ids_TN[counted].tolist()
