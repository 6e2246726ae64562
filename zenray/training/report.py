"""A run's report: its course in plots and in words, as one HTML page that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import Any

from zenray.spec.job_events import Evaluated, Step, parse_event

REPORT_NAME = "report.html"
Event = dict[str, Any]
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f6f6f6;padding:1rem;overflow:auto}"
)


def write_report(title: str, history: Sequence[Event], job: Event) -> str:
    """The page. `history`: events of a training run; `job`: its document. Imports matplotlib, which takes a second."""
    events = [parse_event({"at": 0.0, **event}) for event in history]
    steps = [event for event in events if isinstance(event, Step)]
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    plots = [_loss(steps, evaluations)]
    if any(step.entropy_ratios for step in steps):
        plots += [_entropy(steps), *_routing(steps)]
    pictures = "\n".join(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{png}">' for name, png in plots)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>\n{_facts(steps)}\n{_layers(steps)}\n{_validation(evaluations)}\n{pictures}\n"
        f"<h2>Job</h2><pre>{html.escape(json.dumps(job, indent=2))}</pre></html>\n"
    )


def _facts(steps: Sequence[Step]) -> str:
    last = steps[-1]
    skipped = sum(step.was_skipped for step in steps)
    rows = {
        "steps": f"{len(steps):,}",
        "tokens": f"{sum(step.tokens for step in steps):,}",
        "loss, first and last": f"{steps[0].loss:.4f}, {last.loss:.4f}",
        "next-token loss, first and last": f"{steps[0].lm_loss:.4f}, {last.lm_loss:.4f}",
        "steps not learnt from": f"{skipped:,}",
    }
    return _table(["", ""], [[name, value] for name, value in rows.items()])


def _layers(steps: Sequence[Step]) -> str:
    """How even each sparse layer's load was in the last step, and what its experts had no room for in all steps."""
    last, rows = steps[-1], []
    for layer, ratios in enumerate(zip(last.entropy_ratios, last.effective_ratios, last.max_violations, strict=False)):
        even = [f"{ratio:.{digits}f}" for ratio, digits in zip(ratios, (3, 3, 2), strict=True)]
        lost = [
            sum(counts[layer] for counts in of_steps if counts)
            for of_steps in ([step.dropped_choices for step in steps], [step.fallback_tokens for step in steps])
        ]
        rows.append([f"sparse layer {layer}", *even, *(f"{count:,}" for count in lost)])
    head = ["", "H / log E", "exp(H) / E", "MaxVio", "choices without room, all steps", "tokens with a fallback"]
    return "<h2>Routing, by layer</h2>" + _table(head, rows) if rows else ""


def _validation(evaluations: Sequence[Evaluated]) -> str:
    if not evaluations:
        return ""
    domains = list(dict.fromkeys(event.domain for event in evaluations))
    at = sorted({event.step for event in evaluations})
    shown = {(event.step, event.domain): f"{event.loss:.4f}" for event in evaluations}
    rows = [[f"after {step:,} steps", *(shown.get((step, domain), "") for domain in domains)] for step in at]
    return "<h2>Held-out loss</h2>" + _table(["", *domains], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    shown = [line(head, "th")] if any(head) else []
    return "<table>" + "".join([*shown, *(line(row, "td") for row in rows)]) + "</table>"


def _loss(steps: Sequence[Step], evaluations: Sequence[Evaluated]) -> tuple[str, str]:
    figure, axes = _axes("loss")
    at = [step.step + 1 for step in steps]
    axes.plot(at, [step.lm_loss for step in steps], label="next token", linewidth=1)
    if any(step.kl for step in steps):
        axes.plot(at, [step.kl for step in steps], label="KL to the teachers", linewidth=1)
    for domain in dict.fromkeys(event.domain for event in evaluations):
        found = [(event.step, event.loss) for event in evaluations if event.domain == domain]
        axes.plot(*zip(*found, strict=True), "o--", label=f"held out: {domain}")
    axes.legend()
    return "Loss", _png(figure)


def _entropy(steps: Sequence[Step]) -> tuple[str, str]:
    figure, axes = _axes("H / log E")
    steps = [step for step in steps if step.entropy_ratios]  # others of a long run are kept without
    for layer in range(len(steps[0].entropy_ratios)):
        found = [(step.step + 1, step.entropy_ratios[layer]) for step in steps]
        axes.plot(*zip(*found, strict=True), linewidth=1, label=f"sparse layer {layer}")
    axes.axhline(0.95, color="grey", linestyle=":", linewidth=1)
    axes.set_ylim(top=1.01)
    if len(steps[0].entropy_ratios) <= 12:
        axes.legend(fontsize="small", ncols=2)
    return "Evenness of the experts' load", _png(figure)


def _routing(steps: Sequence[Step]) -> list[tuple[str, str]]:
    """Heat maps of the load per layer and expert, first and last, where experts of all layers are as many."""
    from matplotlib.ticker import MaxNLocator

    found = []
    told = [step for step in steps if step.loads]
    for name, step in (("in the first step", told[0]), ("over the last steps", told[-1])) if told else ():
        experts = max(len(load) for load in step.loads)
        most = max(share * len(load) for load in step.loads for share in load)
        gap = float("nan")  # left white, where a layer has fewer experts
        grid = [[*(share * len(load) for share in load), *[gap] * (experts - len(load))] for load in step.loads]
        figure, axes = _axes("sparse layer")
        picture = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=max(2.0, most))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("expert")
        figure.colorbar(picture, label="load / mean load")
        found.append((f"Routing {name}", _png(figure)))
    return found


def _axes(label: str) -> tuple[Any, Any]:
    """A figure of its own: pyplot's register of figures would keep it alive, and looks for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    return figure, axes


def _png(figure: Any) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100, metadata={"Software": None})
    return base64.b64encode(out.getvalue()).decode("ascii")
