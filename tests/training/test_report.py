"""A run's report: what it says, and that each plot is a picture."""

from __future__ import annotations

import base64
import re
import sys
from typing import Any

from zenray.training.history import files_in
from zenray.training.report import write_report


def history(experts: tuple[int, ...] = (4, 2)) -> list[dict[str, Any]]:
    before = {"event": "evaluation", "step": 0, "domain": "code<1>", "loss": 3.0, "teacher_0": 2.0}
    events: list[dict[str, Any]] = [before]
    for step in range(3):
        loads = [[1 / count] * count for count in experts]
        even = {"entropy_ratios": [0.9] * len(experts), "effective_ratios": [0.75] * len(experts)}
        lost = {"dropped_choices": [700] * len(experts), "fallback_tokens": [step] * len(experts)} if step else {}
        about = {**even, **lost, "max_violations": [0.25] * len(experts), "loads": loads}
        events.append(
            {"event": "step", "step": step, "loss": 3.5 - step, "lm_loss": 3.0, "kl": 0.5, "tokens": 10, **about}
        )
    return [*events, {"event": "evaluation", "step": 3, "domain": "code<1>", "loss": 2.5}]


def test_a_report_has_its_numbers_plots_and_job_in_one_page() -> None:
    page = write_report("mode@v2 & more", history(), {"name": "<job>"})
    assert "mode@v2 &amp; more" in page and "&lt;job&gt;" in page and "<job>" not in page
    for words in ("3.5000, 1.5000", "code&lt;1&gt;", "after 3 steps", "2.5000", "0.900", "0.750", "0.25", "1,400"):
        assert words in page, words
    heads = re.findall(r"<h2>([^<]+)</h2><img", page)
    assert heads == [
        "Loss",
        "Evenness of the experts' load",
        "Routing in the first step",
        "Routing over the last steps",
    ]
    pictures = re.findall(r"base64,([^\"]+)", page)
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures) and len(pictures) == 4
    assert not re.search(r'(?:src|href)="(?!data:)', page), "it needs nothing from elsewhere"
    assert "matplotlib.pyplot" not in sys.modules


def test_what_an_older_run_does_not_say_is_left_out() -> None:
    older = [{name: value for name, value in event.items() if name != "effective_ratios"} for event in history()]
    page = write_report("mode@v1", older, {})
    assert "Loss" in page and "Routing, by layer" not in page
    assert files_in([{"event": "data", "domains": {}}]) == ()


def test_a_dense_network_has_no_routing_to_show() -> None:
    page = write_report("dense@v1", history(experts=()), {})
    assert "Loss" in page and "Routing" not in page and "Evenness" not in page
