"""The head's loss in chunks, the routers' over a batch, learning rates and run names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.training.tiny import CONFIG, job, write_text
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidDocument, InvalidValue
from zenray.spec.jobs import job_id, load_job
from zenray.spec.training import DistillJob, Optimisation, PretrainJob, Workers
from zenray.training import loss as loss_module
from zenray.training.data.stream import IGNORED, pack
from zenray.training.loss import TeacherStates, head_loss, hidden_states
from zenray.training.mesh import Mesh
from zenray.training.optimizer import learning_rate

T, D, V = 23, 8, 31


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    labels_T = torch.randint(0, V, (T,))
    labels_T[[0, 7, 22]] = IGNORED
    teachers = [
        TeacherStates(torch.randn(T, 6), torch.randn(V, 6), 0.25),
        TeacherStates(torch.randn(T, D), torch.randn(V, D), 0.75),
    ]
    return torch.randn(T, D, requires_grad=True), torch.randn(V, D, requires_grad=True), labels_T, teachers


def plain_loss(h_TD, head_VD, labels_T, teachers, distillation, temperature):
    logits = h_TD @ head_VD.t()
    total = F.cross_entropy(logits, labels_T, reduction="sum", ignore_index=IGNORED)
    for teacher in teachers:
        p = (teacher.h_TD @ teacher.head_VD.t() / temperature).softmax(-1)
        q = (logits / temperature).log_softmax(-1)
        of_token = F.kl_div(q, p, reduction="none").sum(-1)
        total = total + distillation * temperature**2 * teacher.weight * of_token[labels_T != IGNORED].sum()
    return total


@pytest.mark.parametrize("chunk", [5, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_teachers_it_is_cross_entropy(inputs, monkeypatch, chunk, dtype) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk)
    h_TD, head_VD, labels_T = (one.detach() for one in inputs[:3])
    h_TD, head_VD = ((20 * one).to(dtype).requires_grad_() for one in (h_TD, head_VD))  # far from even
    reference = plain_loss(h_TD.float(), head_VD.float(), labels_T, [], 0.0, 1.0)
    found = head_loss(h_TD, head_VD, labels_T)
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1.0}
    torch.testing.assert_close(found.total, reference, **tolerance)
    expected = torch.autograd.grad(reference, (h_TD, head_VD))
    torch.testing.assert_close(torch.autograd.grad(found.total, (h_TD, head_VD)), expected, **tolerance)


@pytest.mark.parametrize("chunk", [5, 23, 1024])
@pytest.mark.parametrize(("distillation", "temperature"), [(0.0, 1.0), (0.7, 1.0), (2.0, 3.0)])
def test_chunks_change_neither_loss_nor_gradients(inputs, monkeypatch, chunk, distillation, temperature) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk)
    h_TD, head_VD, labels_T, teachers = inputs
    reference = plain_loss(h_TD, head_VD, labels_T, teachers, distillation, temperature)
    expected = torch.autograd.grad(3 * reference, (h_TD, head_VD))
    found = head_loss(h_TD, head_VD, labels_T, teachers, distillation=distillation, temperature=temperature)
    torch.testing.assert_close(found.total, reference)
    torch.testing.assert_close(found.total, found.lm + distillation * found.kl)
    torch.testing.assert_close(torch.autograd.grad(3 * found.total, (h_TD, head_VD)), expected)


def test_a_frozen_head_and_no_gradients_at_all(inputs) -> None:
    h_TD, head_VD, labels_T, _ = inputs
    expected = torch.autograd.grad(head_loss(h_TD, head_VD, labels_T).total, h_TD)
    found = head_loss(h_TD, head_VD.detach(), labels_T).total
    torch.testing.assert_close(torch.autograd.grad(found, h_TD), expected)
    with torch.no_grad():
        assert not head_loss(h_TD, head_VD, labels_T).total.requires_grad


def test_a_student_that_is_its_teacher_has_no_distance(inputs) -> None:
    h_TD, head_VD, labels_T, _ = inputs
    same = [TeacherStates(h_TD.detach(), head_VD.detach(), 1.0)]
    assert float(head_loss(h_TD, head_VD, labels_T, same, distillation=1.0, temperature=2.0).kl) == pytest.approx(
        0, abs=1e-5
    )


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
