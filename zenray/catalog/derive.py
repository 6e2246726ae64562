"""From a model's file to its entry: what the file leaves out is derived from its total parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pydantic import ValidationError

from zenray.catalog.entries import ModelEntry, ModelFile, Quantization, RateLimit, Serving
from zenray.catalog.policy import FamilyPolicy, QuantizationFormat
from zenray.catalog.pricing import interpolate, make_price, round_significant
from zenray.spec.errors import InvalidDocument, suggest
from zenray.spec.money import Price


@dataclass(frozen=True)
class Anchors:
    """What the documents give, by total parameters."""

    input_usd_per_1k: Mapping[int, Decimal]
    output_usd_per_1k: Mapping[int, Decimal]
    requests_per_minute: Mapping[int, Decimal]
    batch_size: Mapping[int, Decimal]


def complete(file: ModelFile, path: str, family: FamilyPolicy, anchors: Anchors) -> ModelEntry:
    """The entry of `file`. Raises InvalidDocument for a quantization that the family file does not have."""
    formats = _formats(file, path, family)
    written = file.model_dump(
        exclude={
            "price",
            "requests_per_minute",
            "serving",
            "quantizations",
            "default_max_tokens",
            "template_overhead_tokens",
        }
    )
    # The bound on an answer leaves at least half of a short context to the question.
    default_max_tokens = file.default_max_tokens or min(family.default_max_tokens, file.context_tokens // 2)
    overhead = file.template_overhead_tokens
    return build_entry(
        written
        | {
            "file": path,
            "price": _price(file, family, anchors),
            "price_derived": file.price is None,
            "rate_limit": _rate_limit(file, family, anchors),
            "serving": file.serving or _serving(file, family, anchors),
            "quantizations": tuple(_quantization(form, file.parameters.total) for form in formats),
            "lora": family.lora,
            "default_max_tokens": default_max_tokens,
            "template_overhead_tokens": family.template_overhead_tokens if overhead is None else overhead,
        }
    )


def build_entry(data: dict[str, Any]) -> ModelEntry:
    """`data` as an entry; what does not go together is refused as InvalidDocument, with the file's name."""
    try:
        return ModelEntry.model_validate(data)
    except ValidationError as error:
        reasons = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise InvalidDocument(f"{data['file']}: {data['name']}: {reasons}.") from None


def _price(file: ModelFile, family: FamilyPolicy, anchors: Anchors) -> Price:
    digits = family.price.significant_digits
    if file.price:
        price_in, price_out = file.price.input_usd_per_1k, file.price.output_usd_per_1k
        cached = file.price.cached_input_usd_per_1k
    else:
        total = file.parameters.total
        price_in = round_significant(interpolate(total, anchors.input_usd_per_1k), digits)
        price_out = round_significant(interpolate(total, anchors.output_usd_per_1k), digits)
        cached = None
    price_cached = price_in * family.price.cached_input_share if cached is None else cached
    return make_price(price_in, price_cached, price_out)


def _rate_limit(file: ModelFile, family: FamilyPolicy, anchors: Anchors) -> RateLimit:
    given = file.requests_per_minute
    interpolated = interpolate(file.parameters.total, anchors.requests_per_minute)
    derived = max(1, round(round_significant(interpolated, family.limits.significant_digits)))
    return RateLimit(
        requests_per_minute=given or derived,
        burst_factor=family.limits.burst_factor,
        burst_s=family.limits.burst_s,
        derived=given is None,
    )


def _serving(file: ModelFile, family: FamilyPolicy, anchors: Anchors) -> Serving:
    """The smallest layout in which weights take at most `weights_bytes_per_gpu` of each GPU.

    Tensor parallel in powers of two up to its maximum, then pipeline stages. The batch is the largest power of two at
    or below what lies between the given ones.
    """
    policy = family.serving
    weights_bytes = math.ceil(file.parameters.total * _format(policy.quantization, family).bytes_per_parameter)
    tensor_parallel = 1
    while (
        tensor_parallel < policy.max_tensor_parallel and weights_bytes > tensor_parallel * policy.weights_bytes_per_gpu
    ):
        tensor_parallel *= 2
    pipeline_parallel = math.ceil(weights_bytes / (tensor_parallel * policy.weights_bytes_per_gpu))
    batch = interpolate(file.parameters.total, anchors.batch_size)
    return Serving(
        quantization=policy.quantization,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        gpu_memory_bytes=tensor_parallel * pipeline_parallel * policy.gpu_memory_bytes,
        max_batch_size=2 ** max(0, math.floor(math.log2(batch))),
        derived=True,
    )


def _format(name: str, family: FamilyPolicy) -> QuantizationFormat:
    return next(form for form in family.formats if form.name == name)


def _formats(file: ModelFile, path: str, family: FamilyPolicy) -> list[QuantizationFormat]:
    known = [form.name for form in family.formats]
    names = known if file.quantizations is None else file.quantizations
    served = (file.serving.quantization,) if file.serving else ()
    for name in (*names, *served):
        if name not in known:
            raise InvalidDocument(f"{path}: unknown quantization {name!r}.", hint=suggest(name, known))
    return [_format(name, family) for name in names]


def _quantization(form: QuantizationFormat, total_parameters: int) -> Quantization:
    return Quantization(
        name=form.name,
        storage_format=form.storage_format,
        bytes_per_parameter=form.bytes_per_parameter,
        memory_bytes=math.ceil(total_parameters * form.bytes_per_parameter),
    )
