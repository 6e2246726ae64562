"""Makes `traces/chats.jsonl`: an hour's beginning of chat traffic, as a replica's prefix cache sees it.

    python -m tests.gateway.make_trace > tests/gateway/traces/chats.jsonl

One line a request: seconds since the start, the prompt as [segment, tokens] pairs, output tokens. Prompts that begin
with the same segments begin with the same tokens. A dozen assistants of unequal popularity (Zipf) have system prompts
of 200 to 3,000 tokens; conversations begin by a Poisson process with bursts (twenty seconds at four times the rate),
have a geometric number of turns with some ten seconds of reading and typing between them, and each turn's prompt
repeats all before it. Lengths are log-normal. One request in eight is a single long document that shares nothing.
"""

from __future__ import annotations

import json
import random

SEED = 20261122
REQUESTS = 600
ASSISTANTS = 12


def make() -> list[list[object]]:
    chance = random.Random(SEED)
    systems = [[f"system-{number}", chance.randint(200, 3000)] for number in range(ASSISTANTS)]
    popularity = [1 / (rank + 1) for rank in range(ASSISTANTS)]
    requests: list[list[object]] = []
    now_s, number = 0.0, 0
    while len(requests) < 2 * REQUESTS:
        number += 1
        now_s += chance.expovariate(4.0 if now_s % 90 < 20 else 1.0)
        if chance.random() < 0.125:
            requests.append([round(now_s, 3), [[f"document-{number}", _tokens(chance, 2000)]], _tokens(chance, 150)])
            continue
        prompt = [chance.choices(systems, popularity)[0]]
        at_s, turn = now_s, 0
        while turn == 0 or chance.random() < 0.6:
            turn += 1
            prompt = [*prompt, [f"question-{number}.{turn}", _tokens(chance, 60)]]
            output_tokens = _tokens(chance, 150)
            requests.append([round(at_s, 3), prompt, output_tokens])
            prompt = [*prompt, [f"answer-{number}.{turn}", output_tokens]]
            at_s += 0.02 * output_tokens + chance.lognormvariate(2.0, 0.7)
    return sorted(requests, key=lambda request: request[0])[:REQUESTS]  # type: ignore[arg-type,return-value]


def _tokens(chance: random.Random, typical: int) -> int:
    return max(4, min(4000, round(typical * chance.lognormvariate(0.0, 0.8))))


if __name__ == "__main__":
    for request in make():
        print(json.dumps(request, separators=(",", ":")))
