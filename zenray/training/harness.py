"""lm-evaluation-harness over a network of ours: whether it can ask its tasks, and what it finds."""

from __future__ import annotations

import importlib.util
from typing import Any

from zenray.spec.errors import InvalidValue, NotFound
from zenray.spec.evaluation import HarnessTasks, TaskResult
from zenray.training.subject import Subject


def check_tasks(wanted: HarnessTasks) -> None:
    """Before anything is measured. Downloads the tasks' data, unless it is there.

    InvalidValue where lm-eval is not installed and for a task that lets the model write; NotFound for an unknown task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InvalidValue(
            "This job asks for lm_eval, which is not installed.",
            hint="pip install 'zenray[evaluation]', or take `lm_eval` out of the job.",
        )
    from lm_eval.tasks import TaskManager

    try:
        tasks = TaskManager().load(list(wanted.tasks))["tasks"]
    except KeyError as error:
        raise NotFound(f"lm-eval: {error.args[0]}.", hint="`lm-eval ls tasks` lists what it has.") from None
    writing = [name for name, task in tasks.items() if task.get_config("output_type") == "generate_until"]
    if writing:
        raise InvalidValue(
            f"In {', '.join(writing)} the model writes; here only likelihoods are measured.",
            hint="Take tasks whose output_type is multiple_choice, loglikelihood or loglikelihood_rolling.",
        )


def ask_tasks(wanted: HarnessTasks, subject: Subject) -> tuple[TaskResult, ...]:
    """What the tasks' metrics are. Blocks. `check_tasks` comes before."""
    import lm_eval
    from lm_eval.api.model import LM

    class Adapter(LM):
        """What the harness asks of a model; each request's `args` are its arguments."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [subject.log_likelihood(*split(subject, *request.args)) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [subject.log_likelihood(*split(subject, "", request.args[0]))[0] for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise InvalidValue("A task of this job lets the model write; here only likelihoods are measured.")

    found = lm_eval.simple_evaluate(
        model=Adapter(), tasks=list(wanted.tasks), num_fewshot=wanted.few_shot, limit=wanted.most
    )
    return tuple(
        TaskResult(task=task, metric=metric, value=float(value))
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if "," in metric and isinstance(value, int | float)  # "metric,filter"; other entries are about the task
    )


def split(subject: Subject, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Both in tokens, as the harness's own models have them: of one text, the context's last spaces with what follows;
    where nothing stands before, the token that a text begins with. A continuation that disappears in the context's last
    token is taken by itself: as nothing it would be certain, and always the best."""
    before = subject.encode(context.rstrip())
    after = subject.encode(context + continuation)[len(before) :] or subject.encode(continuation)
    return before or [subject.first_token], after
