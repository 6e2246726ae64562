"""Planning a training job: what fits is said to fit, what does not is refused with a sum and a way out that is true."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from zenray.catalog import Catalog
from zenray.catalog.accounting import count_parameters
from zenray.catalog.gpus import find_gpu
from zenray.catalog.plan import plan_training, sum_in_words
from zenray.catalog.training_memory import TrainingLayout, held, stage_weights
from zenray.spec.documents import load_document
from zenray.spec.errors import InvalidValue, ModelNotFound
from zenray.spec.jobs import load_job
from zenray.spec.parallelism import Axes
from zenray.spec.platform import Nodes, Platform
from zenray.spec.training import DistillJob, PretrainJob, TrainingJob

ROOT = Path(__file__).resolve().parents[2]
CATALOG = Catalog.load()
RECIPES = {"zen-14b": "a100-8", "zen-72b": "h100-64", "zen-480b": "h100-512"}
COUNTED = [entry for entry in CATALOG if entry.variant_of is None and entry.dimensions]


def sharded(workers: int, expert_parallel: int) -> TrainingLayout:
    return TrainingLayout(workers, Axes(expert=expert_parallel), fully_sharded=True)


def job(model: str = "zen-14b", workers: dict[str, Any] | None = None, **changes: Any) -> TrainingJob:
    about = {
        "name": "a-job",
        "base": {"model": model, "version": "v1"},
        "into": {"model": model, "version": "v2"},
        "data": {"sources": [{"domain": "prose", "builtin": "prose"}], "sequence_tokens": 4096},
        "steps": 100,
        "sequences_per_step": 64,
        "sequences_per_pass": 1,
        "dtype": "bfloat16",
        "workers": {"count": 8, "expert_parallel": 8, "fully_sharded": True, "gpu": True, **(workers or {})},
        **changes,
    }
    if "teachers" in about:
        return DistillJob.model_validate({"kind": "distill", **about})
    return PretrainJob.model_validate({"kind": "pretrain", **about})


EIGHT = Nodes(count=1, gpu="A100 80GB", gpus=8)


def recipe(name: str) -> TrainingJob:
    found = load_job(ROOT / "jobs" / f"{name}.yaml")
    assert isinstance(found, PretrainJob | DistillJob)
    return found


@pytest.mark.parametrize(("name", "cluster"), RECIPES.items())
def test_a_recipe_fits_its_cluster(name: str, cluster: str) -> None:
    platform = load_document(ROOT / "clusters" / f"{cluster}.yaml", Platform)
    assert platform.nodes is not None
    plan = plan_training(recipe(name), CATALOG, platform.nodes)
    assert plan.gpu is not None and plan.speed is not None
    assert plan.gpus == plan.layout.workers, "a recipe uses the cluster it names"
    assert plan.fullest.fullest.total < plan.gpu.memory_bytes
    assert plan.speed.days * plan.speed.tokens_per_day == pytest.approx(plan.steps * plan.tokens_per_step)
    half = platform.nodes.model_copy(update={"gpus": platform.nodes.gpus // 2})
    with pytest.raises(InvalidValue, match="need as many GPUs"):
        plan_training(recipe(name), CATALOG, half)


def test_every_recipe_at_scale_is_planned_here() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("zen-*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("entry", COUNTED, ids=lambda entry: entry.name)
def test_the_weights_of_all_stages_are_the_model(entry: Any) -> None:
    dimensions = entry.dimensions
    total = count_parameters(dimensions).total
    assert sum(weight.size for weight in stage_weights(dimensions, range(dimensions.layers))) == total
    middle = dimensions.layers // 2
    halves = [*stage_weights(dimensions, range(middle)), *stage_weights(dimensions, range(middle, dimensions.layers))]
    copied = dimensions.vocab_size * dimensions.hidden_size if dimensions.tied_embeddings else 0
    assert sum(weight.size for weight in halves) == total + copied


@pytest.mark.parametrize("layout", [sharded(8, 1), sharded(8, 4), sharded(64, 8)])
def test_the_fullest_workers_part_is_no_less_than_an_even_share_and_little_more(layout: TrainingLayout) -> None:
    dimensions = CATALOG.get("zen-72b").dimensions
    assert dimensions is not None
    weights = list(stage_weights(dimensions, range(dimensions.layers)))
    mine = sum(held(weight, layout, sharded=True) for weight in weights)
    even = sum(weight.size for weight in weights) / layout.workers
    assert even <= mine < 1.01 * even


def test_what_does_not_fit_is_refused_with_the_sum_and_a_way_that_fits() -> None:
    asked = job(workers={"fully_sharded": False}, activation_checkpointing="none")
    with pytest.raises(InvalidValue) as refused:
        plan_training(asked, CATALOG, EIGHT)
    message, hint = refused.value.message, refused.value.hint or ""
    terms = [float(number) for number in re.findall(r"[a-z]+ (\d+\.\d)", message.partition(" = ")[0])]
    total = float(re.findall(r"= (\d+\.\d) GB", message)[0])
    assert sum(terms) == pytest.approx(total, abs=0.05 * len(terms))
    assert total > 73.6 and "73.6 GB" in message
    assert hint == "It fits with workers.fully_sharded: true, activation_checkpointing: full."
    assert plan_training(job(activation_checkpointing="full"), CATALOG, EIGHT).speed is not None


def test_a_hint_to_take_more_workers_is_true_and_the_least() -> None:
    with pytest.raises(InvalidValue) as refused:
        plan_training(job("zen-72b", sequences_per_step=8), CATALOG, EIGHT)
    count = int(re.findall(r"workers\.count: (\d+)", refused.value.hint or "")[0])
    for workers, fits in ((count, True), (count // 2, False)):
        asked = job("zen-72b", {"count": workers}, sequences_per_step=workers)
        nodes = EIGHT.model_copy(update={"count": math.ceil(workers / 8)})
        if fits:
            plan_training(asked, CATALOG, nodes)
        else:
            with pytest.raises(InvalidValue, match="does not fit"):
                plan_training(asked, CATALOG, nodes)


def test_an_early_stage_keeps_the_activations_of_more_passes() -> None:
    stages = plan_training(recipe("zen-480b"), CATALOG).stages
    kept = [stage.loss.activations for stage in stages]
    assert len(stages) == 8 and kept == sorted(kept, reverse=True)
    assert stages[0].loss.logits == 0 < stages[-1].loss.logits
    with pytest.raises(ValueError, match="pipeline"):
        job(workers={"count": 8, "expert_parallel": 1, "pipeline_parallel": 3})


def test_stages_keep_room_for_what_all_passes_bring_from_their_neighbours() -> None:
    asked = recipe("zen-480b")
    twice = asked.model_copy(update={"sequences_per_step": 2 * asked.sequences_per_step})
    plans = [plan_training(one, CATALOG).stages for one in (asked, twice)]
    grown = [more.loss.buffers - less.loss.buffers for less, more in zip(*plans, strict=True)]
    one_pass = 4096 * CATALOG.get("zen-480b").dimensions.hidden_size * 2  # type: ignore[union-attr]
    assert grown == [16 * one_pass, *[2 * 16 * one_pass] * 6, 16 * one_pass]


def test_with_fewer_passes_than_stages_every_stage_keeps_them_all_and_teachers_run_beside_the_last() -> None:
    workers = {"count": 8, "expert_parallel": 1, "pipeline_parallel": 8}
    for passes, kept in ((2, [2] * 8), (8, [8, 7, 6, 5, 4, 3, 2, 1])):
        stages = plan_training(job(workers=workers, sequences_per_step=passes), CATALOG).stages
        in_flight = [stage.backward_ends.activations for stage in stages]
        assert [sorted(set(in_flight)).index(one) for one in in_flight] == [
            sorted(set(kept)).index(one) for one in kept
        ]
    teachers = [{"version": {"model": "zen-14b"}}]
    held = [stage.loss.teachers for stage in plan_training(job(workers=workers, teachers=teachers), CATALOG).stages]
    assert held[-1] > 0 and not any(held[:-1])


def test_passes_of_a_sharded_step_add_up_whole_gradients() -> None:
    one, two = (plan_training(job(sequences_per_step=n), CATALOG, EIGHT).fullest.loss for n in (8, 16))
    gathered = sum(
        held(weight, sharded(8, 8), sharded=False)
        for weight in stage_weights(CATALOG.get("zen-14b").dimensions, range(40))  # type: ignore[arg-type]
    )
    hidden = 2560
    assert two.buffers - one.buffers == pytest.approx(4 * (gathered - hidden), rel=1e-3)  # all but the last norm


def test_speed_is_the_assumed_share_of_the_peak_and_grows_with_the_workers() -> None:
    gpu = find_gpu("A100 80GB")
    plain = plan_training(job(activation_checkpointing="none", sequences_per_step=8), CATALOG, EIGHT).speed
    again = plan_training(job(activation_checkpointing="full"), CATALOG, EIGHT).speed
    assert plain is not None and again is not None
    per_s = 8 * gpu.bf16_flops_per_s * gpu.assumed_mfu / plain.flops_per_token
    assert plain.tokens_per_day == pytest.approx(86_400 * per_s)
    assert plain.tokens_per_day / again.tokens_per_day == pytest.approx(4 / 3)
    sixteen = plan_training(job(workers={"count": 16}), CATALOG, EIGHT.model_copy(update={"count": 2})).speed
    assert sixteen is not None
    assert sixteen.tokens_per_day == pytest.approx(2 * again.tokens_per_day)


def test_a_teacher_costs_its_forward_pass_and_its_weights() -> None:
    teacher = {"version": {"model": "zen-7b"}}
    alone, taught = (plan_training(one, CATALOG, EIGHT) for one in (job(), job(teachers=[teacher])))
    assert alone.speed is not None and taught.speed is not None
    extra = taught.speed.flops_per_token - alone.speed.flops_per_token
    assert extra == pytest.approx(2 * 7e9, rel=0.2)
    eighth_of_the_teacher = 2 * 7e9 / 8
    assert 8 * eighth_of_the_teacher > taught.fullest.loss.teachers > eighth_of_the_teacher
    kept = plan_training(job(teachers=[{**teacher, "top_logits": 64}]), CATALOG, EIGHT)
    assert kept.fullest.loss.teachers > 8 * eighth_of_the_teacher, "it lies whole on every worker"


@pytest.mark.parametrize(("about", "share"), [({}, 1.0), ({"top_logits": 64}, 0.25)])
def test_a_teacher_of_one_domain_runs_on_that_domains_sequences_unless_it_is_cut(about: Any, share: float) -> None:
    sources = [{"domain": name, "builtin": name, "weight": weight} for name, weight in (("prose", 3), ("code", 1))]
    data = {"sources": sources, "sequence_tokens": 4096}
    teachers = [{"version": {"model": "zen-7b"}, **about}]
    alone, always, seldom = (
        plan_training(job(data=data, **changes), CATALOG, EIGHT).speed
        for changes in ({}, {"teachers": teachers}, {"teachers": [{**teachers[0], "domains": ["code"]}]})
    )
    assert alone and always and seldom
    extra = [speed.flops_per_token - alone.flops_per_token for speed in (seldom, always)]
    assert extra[0] == pytest.approx(share * extra[1])


def test_on_cpus_only_the_memory_is_reckoned() -> None:
    found = load_job(ROOT / "jobs" / "distill-smollm2-mode.yaml")
    assert isinstance(found, DistillJob)
    plan = plan_training(found, CATALOG, EIGHT)
    assert plan.speed is None and plan.gpu is None
    assert plan.fullest.fullest.weights * 4 == plan.fullest.fullest.moments * 3, (
        "bfloat16 and its masters: six bytes, and eight of moments"
    )
    assert sum_in_words(plan.fullest.fullest).endswith("GB")


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        (job("zen-14c"), ModelNotFound, "zen-14b"),
        (job(teachers=[{"version": {"model": "smollm2-135m"}}]), InvalidValue, "49,152"),
        (job(data={"sources": [{"domain": "x", "builtin": "code"}], "sequence_tokens": 65536}), InvalidValue, "32,768"),
    ],
    ids=["unknown model", "another vocabulary", "beyond the context"],
)
def test_what_cannot_be_is_refused(asked: TrainingJob, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as refused:
        plan_training(asked, CATALOG, EIGHT)
    assert says in str(refused.value)


def test_an_unknown_gpu_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InvalidValue) as refused:
        plan_training(job(), CATALOG, EIGHT.model_copy(update={"gpu": "H100"}))
    assert "H100 80GB" in (refused.value.hint or "")
