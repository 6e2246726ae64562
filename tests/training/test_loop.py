"""The loop from the first step to the last, killed and resumed, on tiny networks and real files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.training.tiny import CONFIG, FolderRecorder, job, write_version
from zenray.spec.errors import InvalidValue
from zenray.spec.training import PretrainJob, TrainingJob
from zenray.training.loop import Outcome, TrainingSet, train
from zenray.training.networks import Checkpoint
from zenray.training.trainer import Trainer


@pytest.fixture
def run(base: Checkpoint, tokens):
    def start(job: TrainingJob, recorder: FolderRecorder, teacher: Checkpoint | None = None) -> Outcome:
        torch.set_num_threads(1)
        model = base.network() if job.weights == "base" else base.fresh_network(job.seed)
        trainer = Trainer(model, job, teachers=[(teacher.network(), (1.0, 1.0))] if teacher else ())
        return train(trainer, TrainingSet.open(job, tokens), recorder)

    return start


def test_training_learns(run, text, tmp_path) -> None:
    history = run(job(text, steps=30, checkpoints={"every_steps": 30}), FolderRecorder(tmp_path)).history
    steps = [event for event in history if event["event"] == "step"]
    losses = [event["loss"] for event in history if event["event"] == "evaluation" and event["domain"] == "count"]
    assert steps[-1]["lm_loss"] < steps[0]["lm_loss"] - 1
    assert losses[-1] < losses[0] - 1
    assert [event["step"] for event in steps] == list(range(30))
    assert all(event["tokens"] == 4 * 32 for event in steps)


def test_distillation_draws_the_student_to_its_teacher(run, text, tmp_path, tmp_path_factory) -> None:
    """With a large λ the student ends nearer to the teacher than by text alone."""
    teacher = Checkpoint.open(write_version(tmp_path / "teacher", replace(CONFIG, initializer_range=0.3), seed=7))
    lambdas = {}
    for coefficient in (0.0, 20.0):
        wanted = job(text, "distill", steps=25, distillation=coefficient, checkpoints={"every_steps": 25})
        history = run(wanted, FolderRecorder(tmp_path / f"at-{coefficient}"), teacher).history
        lambdas[coefficient] = [event["kl"] for event in history if event["event"] == "step"]
    assert lambdas[0.0][0] == pytest.approx(lambdas[20.0][0])
    assert lambdas[20.0][-1] < 0.7 * lambdas[20.0][0]
    assert lambdas[20.0][-1] < lambdas[0.0][-1]


def test_a_teacher_of_another_vocabulary_is_refused(base, text, tmp_path) -> None:
    other = Checkpoint.open(write_version(tmp_path / "other", replace(CONFIG, vocab_size=300)))
    with pytest.raises(InvalidValue, match="300 tokens in its vocabulary, the student 257"):
        Trainer(base.network(), job(text, "distill"), teachers=[(other.network(), (1.0, 1.0))])


def test_a_step_that_is_not_finite_changes_nothing(run, base, tokens, text) -> None:
    wanted = job(text)
    data = TrainingSet.open(wanted, tokens)
    trainer = Trainer(base.network(), wanted)
    before = {one.name: one.master.detach().clone() for one in trainer.trainables}
    weight = trainer.model.model.norm.weight
    kept = weight.detach().clone()
    weight.data.fill_(float("nan"))
    assert trainer.step(0, data.step(wanted, trainer.mesh, 0)).was_skipped
    weight.data.copy_(kept)
    for one in trainer.trainables:
        assert torch.equal(one.master, before[one.name])
        assert not trainer.optimizer.state[one.master]["exp_avg"].any()
    assert not trainer.step(0, data.step(wanted, trainer.mesh, 0)).was_skipped


def test_stop_ends_the_run_at_the_first_step_that_is_not_finite(base, tokens, text, tmp_path) -> None:
    wanted = job(text, faults={"not_finite": "stop"})
    trainer = Trainer(base.network(), wanted)
    trainer.model.model.norm.weight.data.fill_(float("inf"))
    recorder = FolderRecorder(tmp_path)
    outcome = train(trainer, TrainingSet.open(wanted, tokens), recorder)
    assert outcome.stopped == "at step 1 a loss of nan and a gradient norm of nan are not finite"
    assert recorder.names == []


@pytest.mark.parametrize("part", ["dense", "routers", "experts", "experts/code"])
def test_only_the_chosen_part_learns(run, base, tokens, text, part) -> None:
    wanted = job(text, train=(part,))
    trainer = Trainer(base.network(), wanted)
    trainer.step(0, TrainingSet.open(wanted, tokens).step(wanted, trainer.mesh, 0))
    start = base.network()
    changed = {
        name
        for (name, one), other in zip(trainer.model.named_parameters(), start.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    kinds = {
        "experts" if ".experts." in name else "routers" if "mlp.gate.weight" in name else "dense" for name in changed
    }
    assert kinds == {part.partition("/")[0]}
    if part == "experts/code":
        learned = trainer.model.model.layers[1].mlp.experts.down_proj != start.model.layers[1].mlp.experts.down_proj
        assert [bool(one.any()) for one in learned] == [False, False, True, True]


def test_an_unknown_expert_group_is_refused_with_the_known_ones(base, text) -> None:
    with pytest.raises(InvalidValue, match=r"no expert group 'coed'.*Did you mean 'code'"):
        Trainer(base.network(), job(text, train=("experts/coed",)))


def test_fresh_weights_are_a_sound_network_that_the_seed_names(base) -> None:
    one, again, other = (base.fresh_network(seed) for seed in (1, 1, 2))
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert all(value.isfinite().all() for value in one.state_dict().values())
    assert torch.equal(one.model.norm.weight, torch.ones(16))


def test_half_precision_keeps_small_updates_in_its_masters(base, tokens, text) -> None:
    """A thousandth of bfloat16's resolution is lost in one step, and must not be in many."""
    wanted = PretrainJob(**{**job(text).model_dump(), "dtype": "bfloat16"})
    wanted = wanted.model_copy(
        update={"optimisation": wanted.optimisation.model_copy(update={"learning_rate": 1e-7, "weight_decay": 0.0})}
    )
    trainer = Trainer(base.network(), wanted)
    data = TrainingSet.open(wanted, tokens)
    for step in range(3):
        trainer.step(step, data.step(wanted, trainer.mesh, step))
    norm = next(one for one in trainer.trainables if one.name == "model.norm.weight")
    assert norm.parameter.dtype == torch.bfloat16 and norm.master.dtype == torch.float32
    assert torch.equal(norm.parameter, torch.ones_like(norm.parameter))
    assert not torch.equal(norm.master, torch.ones_like(norm.master))
