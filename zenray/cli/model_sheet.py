"""What `zenray models show` prints of a catalog entry: facts, and tables of claims beside what can be computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from zenray.catalog.accounting import flops_per_token, kv_cache_bytes, kv_cache_bytes_per_token
from zenray.catalog.claims import ClaimedLora, ClaimedThroughput, ClaimedTraining
from zenray.catalog.comparison import Comparison, compare
from zenray.catalog.entries import ModelEntry
from zenray.catalog.fit import TOLERANCE
from zenray.cli.output import show_facts, show_table
from zenray.spec.dimensions import ModelDimensions
from zenray.spec.money import Price

Row = tuple[str, str, str, str]
"""A claim, in which setting, the value, and the document that makes it."""


def show_sheet(entry: ModelEntry) -> None:
    """Print all that the catalog knows about one model."""
    show_facts(facts(entry))
    _show(
        "Quantizations",
        ["quantization", "#bytes per parameter", "#memory for weights"],
        [[q.name, f"{q.bytes_per_parameter:g}", in_bytes(q.memory_bytes)] for q in entry.quantizations],
    )
    _show(
        "Claimed against computed",
        ["claim", "#claimed", "#computed", "#deviation", ""],
        [_compared(one) for one in compare(entry)],
    )
    _show("Claims that arithmetic cannot check", ["claim", "setting", "#claimed", "source"], list(claims(entry)))
    _show("Notes", ["##", "note"], [[str(number), note] for number, note in enumerate(entry.notes, 1)])


def facts(entry: ModelEntry) -> dict[str, str]:
    """By name, what is true of a model whatever documents claim."""
    price_in, price_out = in_usd(entry.price)
    limit = f"{entry.rate_limit.requests_per_minute:,} requests a minute and key"
    serving, dimensions = entry.serving, entry.dimensions
    moe = dimensions.moe if dimensions else None
    found = {
        "model": f"{entry.name}: {entry.summary}",
        "parameters": f"{in_words(entry.parameters.total)} in all, {in_words(entry.parameters.active)} active",
        "experts": f"{moe.experts}, {moe.top_k} for each token" if moe else "dense",
        "context": f"{entry.context_tokens:,} tokens",
        **(_costs(dimensions, entry.context_tokens) if dimensions else {}),
        "modalities": ", ".join(entry.modalities),
        "price": f"${price_in} in, ${price_out} out per 1,000 tokens{' (derived)' if entry.price_derived else ''}",
        "limit": f"{limit}{' (derived)' if entry.rate_limit.derived else ''}",
        "GPUs": f"{serving.gpus} (tensor parallel {serving.tensor_parallel}, pipeline parallel "
        f"{serving.pipeline_parallel}), {in_bytes(serving.gpu_memory_bytes)}",
        "license": entry.license,
    }
    if entry.variant_of:
        found["variant of"] = f"{entry.variant_of}: {entry.differs}"
    return found


def _costs(dimensions: ModelDimensions, context_tokens: int) -> dict[str, str]:
    alone, at_the_end = (flops_per_token(dimensions, context) / 1e9 for context in (0, context_tokens))
    whole = in_bytes(kv_cache_bytes(dimensions, context_tokens))
    return {
        "compute": f"{_digits(alone)} GFLOPs a token, {_digits(at_the_end)} at the end of a whole context",
        "KV cache": f"{kv_cache_bytes_per_token(dimensions):,} bytes a token, {whole} for a whole context",
    }


def claims(entry: ModelEntry) -> Iterator[Row]:
    """What the documents say that does not follow from a model's dimensions, nor contradict them."""
    said = entry.claims
    for score in said.scores:
        yield score.benchmark, score.setting or "", f"{score.score:g}", score.source
    if said.quality_vs_dense_percent is not None:
        dense = in_words(said.dense_parameters or entry.parameters.total)
        yield "quality", f"of a dense {dense}", f"{said.quality_vs_dense_percent:g}%", ""
    for speed in said.throughput:
        yield from _throughput(speed)
    for memory in said.memory:
        if memory.hardware:
            yield f"weights in {memory.quantization}", memory.hardware, f"{memory.total_gb:g} GB", memory.source
    if said.power is not None:
        yield "power", "continuous operation", f"{said.power.power_w:g} W", said.power.source
        yield "CO2", "a month", f"{said.power.co2_kg_per_month:g} kg", said.power.source
    if said.training is not None:
        yield _training(said.training)
    if said.lora is not None:
        yield from _lora(said.lora)


def _throughput(speed: ClaimedThroughput) -> Iterator[Row]:
    where = ", ".join(part for part in (speed.hardware, speed.quantization) if part)
    if speed.ttft_ms is not None:
        yield "first token", where, f"{speed.ttft_ms:g} ms", speed.source
    batch = f", batch of {speed.batch}" if speed.batch > 1 else ""
    per_s = _range(speed.tokens_per_s_min, speed.tokens_per_s_max)
    yield "tokens a second", f"{where}{batch}", per_s, speed.source


def _training(training: ClaimedTraining) -> Row:
    how = []
    if training.upcycled_from_parameters is not None:
        how.append(f"upcycled from a dense {in_words(training.upcycled_from_parameters)}")
    if training.drop_rate is not None:
        how.append(f"{training.drop_rate:.0%} of rows dropped")
    if training.batch_size is not None:
        how.append(f"batch of {training.batch_size}")
    if training.learning_rate is not None:
        how.append(f"learning rate {training.learning_rate:g}")
    if training.epochs_min is not None:
        how.append(f"epochs {_range(training.epochs_min, training.epochs_max)}")
    if training.gpu_hours is not None:
        how.append(f"{training.gpu_hours:,.0f} GPU-hours")
    tokens = "" if training.tokens is None else f"{in_words(training.tokens)} tokens"
    return "training", ", ".join(how), tokens, training.source


def _lora(lora: ClaimedLora) -> Iterator[Row]:
    yield "LoRA", lora.targets, f"rank {lora.rank}, alpha {lora.alpha}", lora.source
    yield "", f"that is {', '.join((*lora.target_modules, *lora.target_parameters))}", "", ""


def _range(least: float, most: float | None) -> str:
    if most is None:
        return f"{least:,g}+"
    return f"{least:,g}" if least == most else f"{least:,g}–{most:,g}"


def _compared(one: Comparison) -> list[str]:
    def number(value: float) -> str:
        return in_words(round(value)) if value >= 10**6 else _digits(value)

    what = f"{one.what} ({one.unit})" if one.unit else one.what
    differs = "differs" if abs(one.deviation) > TOLERANCE else ""
    return [what, number(one.claimed), number(one.computed), f"{one.deviation:+.1%}", differs]


def _show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if rows:
        show_table(columns, rows, title=f"\n{title}")


def _digits(value: float) -> str:
    """Three significant digits, and never fewer than the whole part has."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def in_usd(price: Price) -> tuple[str, str]:
    """Input and output, per 1,000 tokens."""
    return f"{price.input_usd_per_1k:f}", f"{price.output_usd_per_1k:f}"


def in_words(count: int) -> str:
    """134.5M, 72B, 1T."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:.4g}{name}"
    return str(count)


def in_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
