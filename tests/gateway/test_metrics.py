"""The gateway's numbers for Prometheus: nothing is lost between a request and a scrape."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zenray.gateway.metrics import Metrics
from zenray.spec.usage import Usage

REQUESTS = st.lists(
    st.tuples(st.sampled_from(["a", "b", ""]), st.sampled_from([200, 400, 499]), st.floats(0, 400), st.booleans()),
    max_size=40,
)


def numbers(metrics: Metrics) -> dict[str, float]:
    lines = metrics.render().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


@given(REQUESTS, st.integers(0, 40))
def test_what_is_shown_is_the_sum_of_what_was_told(requests: list[tuple[str, int, float, bool]], fold_at: int) -> None:
    metrics = Metrics()
    for place, (model, status, latency_s, streamed) in enumerate(requests):
        if place == fold_at:
            metrics.fold()
        metrics.request(model, status, latency_s)
        if model:
            usage = Usage(input_tokens=3, cached_input_tokens=1, output_tokens=2)
            metrics.usage(model, usage, latency_s if streamed else None)
            metrics.choice(model, "known")
    shown = numbers(metrics)
    for model in ("a", "b", ""):
        of_model = [request for request in requests if request[0] == model]
        for status in (200, 400, 499):
            name = f'zenray_gateway_requests_total{{model="{model}",status="{status}"}}'
            assert shown.get(name, 0) == sum(request[1] == status for request in of_model)
        if not model:
            continue
        assert shown.get(f'zenray_gateway_input_tokens_total{{model="{model}"}}', 0) == 3 * len(of_model)
        assert shown.get(f'zenray_gateway_output_tokens_total{{model="{model}"}}', 0) == 2 * len(of_model)
        assert shown.get(f'zenray_gateway_cached_input_tokens_total{{model="{model}"}}', 0) == len(of_model)
        chosen = f'zenray_gateway_replica_choices_total{{model="{model}",why="known"}}'
        assert shown.get(chosen, 0) == len(of_model)
        bucket = f'zenray_gateway_latency_seconds_bucket{{le="0.1",model="{model}"}}'
        assert shown.get(bucket, 0) == sum(request[2] <= 0.1 for request in of_model)
        ttft = f'zenray_gateway_ttft_seconds_count{{model="{model}"}}'
        assert shown.get(ttft, 0) == sum(request[3] for request in of_model)
