"""What packed documents see, learning rates, and which jobs are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.tiny import CONFIG, job, write_text
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidDocument, InvalidValue
from zenray.spec.jobs import job_id, load_job
from zenray.spec.training import DistillJob, Optimisation, PretrainJob, Workers
from zenray.training.data.stream import pack
from zenray.training.loss import hidden_states
from zenray.training.mesh import Mesh
from zenray.training.optimizer import learning_rate


def test_packed_documents_are_as_if_alone() -> None:
    """Hidden states of three documents in one sequence are those of each by itself."""
    torch.manual_seed(0)
    model = MoDE(CONFIG).eval()
    tokens = torch.randint(0, 257, (14,)).numpy()
    documents = torch.tensor([0] * 4 + [1] * 7 + [2] * 3).numpy()
    packed, _ = hidden_states(model, pack([(tokens, documents)]))
    for start, end in ((0, 4), (4, 11), (11, 13)):
        alone, _ = hidden_states(model, pack([(tokens[start : end + 1], documents[start : end + 1] * 0)]))
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-5, atol=1e-5)


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    settings = Optimisation(learning_rate=2.0, warmup_steps=4, final_share=0.25)
    rates = [learning_rate(step, 25, settings) for step in range(25)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0 and rates[14] == pytest.approx(2.0 * (0.25 + 0.75 / 2)) and rates[24] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(0, 1, Optimisation(learning_rate=1.0, warmup_steps=0)) > 0


def test_a_run_is_named_by_all_that_changes_its_result(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    name = job_id(job(text))
    assert name.startswith("tiny-")
    assert job_id(job(text, workers={"count": 2, "expert_parallel": 2})) == name
    others = {job_id(job(text, **change)) for change in ({"steps": 7}, {"seed": 1}, {"train": ("experts",)})}
    assert len(others) == 3 and name not in others


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": {"count": 4, "expert_parallel": 3}}, "expert_parallel can be 1, 2, 4"),
        ({"workers": {"count": 3}}, "use a multiple of 6"),
        ({"train": ("heads",)}, "'heads' cannot be trained"),
        ({"dtype": "float16"}, "'float32' or 'bfloat16'"),
    ],
)
def test_a_job_that_cannot_run_is_refused_with_what_can(tmp_path, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        job(write_text(tmp_path), **change)


def test_the_mesh_of_one_process_refuses_groups() -> None:
    with pytest.raises(InvalidValue, match="1 workers cannot form expert groups of 2"):
        Mesh.create(2)
    assert [Mesh(None, 4).chunk(6, rank) for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 6)]
    assert Workers().expert_parallel == 1


def test_job_files(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("kind: distil\nname: x\n")
    with pytest.raises(InvalidDocument, match="Did you mean 'distill'"):
        load_job(tmp_path / "job.yaml")
    for path in sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml")):
        found = load_job(path)
        if path.name.startswith("distill"):
            assert isinstance(found, DistillJob)
        assert not path.name.startswith("pretrain") or isinstance(found, PretrainJob)
