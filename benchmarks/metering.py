"""The metering hot loop alone: what recording one request exactly adds to answering it.

    python -m benchmarks.metering [--quick] [--folder DIR]

One request is: reserve its worst case, open it in the log (one write), count its tokens N times in its slot, close it
in the log, settle its lease. The thread that syncs the log to the disk runs all the while. The same loop without any
of that is timed in alternation with it, and the difference is what metering adds. Shipping (what the sender
does beside the network: reading the pending events, making the batch's JSON, acknowledging) is timed apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from benchmarks.report import print_report
from zenray.gateway.metering import LeaseBook, Meter
from zenray.spec.clock import SystemClock
from zenray.spec.edge import UsageBatch
from zenray.spec.money import Price
from zenray.spec.usage import Outcome, Usage

INPUT_TOKENS = 300
RESERVE_NANO_USD = 1_000_000
BATCH_EVENTS = 500
PRICE = Price(
    version="benchmark",
    input_usd_per_1k=Decimal("0.0003"),
    cached_input_usd_per_1k=Decimal("0.00015"),
    output_usd_per_1k=Decimal("0.0006"),
)


def unmetered(requests: int, counts: int) -> None:
    """The loop without metering: the same numbers are made, and nothing is done with them."""
    for number in range(requests):
        request_id = f"chatcmpl-{number:032x}"
        for output_tokens in range(1, counts + 1):
            _use(request_id, INPUT_TOKENS, output_tokens)
        Usage(input_tokens=INPUT_TOKENS, output_tokens=counts)


def metered(meter: Meter, leases: LeaseBook, requests: int, counts: int) -> None:
    for number in range(requests):
        request_id = f"chatcmpl-{number:032x}"
        if not leases.reserve("acme", RESERVE_NANO_USD):
            raise RuntimeError("the benchmark's lease is used up")
        charge = meter.open(
            request_id=request_id,
            org="acme",
            key_id="key-0123456789",
            user_id="user-0123456789",
            model_asked="zen-7b",
            model_answered="zen-7b",
            adapter=None,
            quantization="awq-int4",
            price=PRICE,
            reserve_nano_usd=RESERVE_NANO_USD,
        )
        charge.first_token()
        for output_tokens in range(1, counts + 1):
            charge.count(0, INPUT_TOKENS, output_tokens)
        usage = Usage(input_tokens=INPUT_TOKENS, output_tokens=counts)
        charge.close(Outcome.COMPLETED, usage, "stop")
        leases.settle("acme", RESERVE_NANO_USD, charge.cost_nano_usd)


def _use(request_id: str, input_tokens: int, output_tokens: int) -> None:
    pass


def ship(meter: Meter) -> int:
    """What shipping costs this process, without the network; the number of batches."""
    batches = 0
    while events := meter.pending(BATCH_EVENTS):
        UsageBatch(gateway_id=meter.gateway_id, boot_id=meter.boot_id, events=tuple(events)).model_dump_json()
        meter.acknowledge(event.billing_key for event in events)
        batches += 1
    return batches


@dataclass
class Spent:
    """Microseconds per request: by the clock, and of this thread's CPU (which other programs do not touch)."""

    wall_us: float = 0.0
    cpu_us: float = 0.0

    def add(self, work: Callable[[], object], requests: int) -> None:
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        work()
        self.cpu_us += (time.thread_time() - cpu_s) / requests * 1e6
        self.wall_us += (time.perf_counter() - wall_s) / requests * 1e6


def measure(folder: Path, counts: int, requests: int, rounds: int) -> dict[str, float]:
    """Medians over rounds, in microseconds per request. The loops alternate batch by batch: noise meets all of them."""
    clock = SystemClock()
    meter = Meter(folder, "benchmark", max_streams=4096, max_wal_bytes=1 << 30, clock=clock)
    leases = LeaseBook(clock)
    leases.granted("acme", 1 << 62)
    bare, with_meter, shipping = ([Spent() for _ in range(rounds)] for _ in range(3))
    try:
        metered(meter, leases, BATCH_EVENTS, counts)  # warm up
        ship(meter)
        for number in range(rounds):
            for _ in range(requests // BATCH_EVENTS):
                bare[number].add(lambda: unmetered(BATCH_EVENTS, counts), requests)
                with_meter[number].add(lambda: metered(meter, leases, BATCH_EVENTS, counts), requests)
                shipping[number].add(lambda: ship(meter), requests)
    finally:
        meter.close()
    pairs = list(zip(with_meter, bare, strict=True))
    return {
        "bare_us": statistics.median(spent.wall_us for spent in bare),
        "metered_us": statistics.median(spent.wall_us for spent in with_meter),
        "added_us": statistics.median(one.wall_us - other.wall_us for one, other in pairs),
        "added_cpu_us": statistics.median(one.cpu_us - other.cpu_us for one, other in pairs),
        "shipping_us": statistics.median(spent.wall_us for spent in shipping),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer requests; a few seconds")
    parser.add_argument("--folder", type=Path, help="where the log is written (default: the system's temporary folder)")
    options = parser.parse_args()
    rounds = 5 if options.quick else 11
    requests_by_counts = {1: 3_000, 64: 1_500} if options.quick else {1: 10_000, 64: 5_000}
    results = {}
    with tempfile.TemporaryDirectory(prefix="zenray-metering-", dir=options.folder) as folder:
        for counts, requests in requests_by_counts.items():
            results[counts] = measure(Path(folder, str(counts)), counts, requests, rounds)
    one, many = results[1], results[64]
    us_per_count = (many["added_cpu_us"] - one["added_cpu_us"]) / 63
    print_report(
        "What metering adds to a request (median, µs)",
        ["counts", "requests", "rounds", "loop alone", "metered", "added", "added CPU", "shipping", "requests/s"],
        [
            [counts, requests_by_counts[counts], rounds, r["bare_us"], r["metered_us"], r["added_us"],
             r["added_cpu_us"], r["shipping_us"], 1e6 / r["metered_us"]]
            for counts, r in results.items()
        ],
        {
            "benchmark": "metering",
            "quick": options.quick,
            "added_us": round(one["added_us"], 2),
            "added_cpu_us": round(one["added_cpu_us"], 2),
            "added_us_64_counts": round(many["added_us"], 2),
            "us_per_count": round(us_per_count, 3),
            "shipping_us": round(one["shipping_us"], 2),
            "requests_per_s": round(1e6 / one["metered_us"]),
            "requests_per_s_64_counts": round(1e6 / many["metered_us"]),
            "cpus": os.cpu_count(),
        },
        notes=[
            f"One more count adds {us_per_count:.2f} µs of CPU. The log is synced every 50 ms by a thread of its own.",
            "By the clock, what else runs on the machine counts too; the CPU time is this loop's alone.",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
