"""Teachers of which only the likeliest tokens are kept: asked once for each sequence, read from disk from then on.

S sequence, N tokens kept. A sequence is known by its content, so it does not matter which run, order or worker asked.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter
from torch import Tensor

from zenray.model.distillation import CHUNK_TOKENS, IGNORED, TopLogits, keep_top
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue, UpstreamFailed
from zenray.spec.training import TeacherEndpoint
from zenray.training.data.stream import Batch
from zenray.training.disk import raise_if_full
from zenray.training.loss import hidden_states

_ANSWER_S = 120.0

Ask = Callable[[Batch], TopLogits]
"""What a teacher thinks of one sequence: ids and log-probabilities (S, N), on the CPU. Rows without a target may hold
anything."""


class TopTeacher:
    """A teacher behind a folder of its answers. `name`: says which teacher, exactly; answers of others are not read."""

    def __init__(self, ask: Ask, folder: Path, name: str, count: int, temperature: float = 1.0) -> None:
        digest = hashlib.sha256(f"{name}\n{count}\n{temperature!r}".encode()).hexdigest()
        self._ask, self._folder = ask, folder / digest[:24]
        self.count, self.temperature = count, temperature

    def top_logits(self, batch: Batch) -> TopLogits:
        """Of all positions of the batch, (B · S, N). Blocks while the teacher is asked for what is not kept yet."""
        found = [self.of(batch, number) for number in range(batch.ids_BS.shape[0])]
        ids, log_probs = (torch.cat([one[part] for one in found]) for part in (0, 1))
        return TopLogits(ids, log_probs, self.temperature)

    def of(self, batch: Batch, number: int) -> TopLogits:
        """Of one sequence, (S, N). Blocks as `top_logits` does."""
        sequence = _row(batch, number)
        parts = (sequence.ids_BS, sequence.labels_BS, sequence.document_BS)
        key = hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()
        path = self._folder / key[:2] / f"{key}.npz"
        if not path.is_file():
            self._keep(self._ask(sequence), path)
        with np.load(path) as kept:
            ids, log_probs = torch.from_numpy(kept["ids"]), torch.from_numpy(kept["log_probs"])
        return TopLogits(ids, log_probs.float(), self.temperature)

    def _keep(self, answer: TopLogits, path: Path) -> None:
        """StorageUnavailable where the disk is full."""
        ids, log_probs = answer.ids_TN.numpy(), answer.log_probs_TN.half().numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                np.savez(file, ids=ids, log_probs=log_probs)
            os.replace(file.name, path)
        except OSError as error:
            takes = f"a teacher's answer to one sequence takes {(ids.nbytes + log_probs.nbytes) / 1e6:,.1f} MB"
            raise_if_full(error, self._folder, takes, "Free some space, or keep fewer `top_logits` of the teacher.")
            raise


def _row(batch: Batch, number: int) -> Batch:
    return Batch(*(tensor[number : number + 1].cpu() for tensor in vars(batch).values()))


class NetworkAnswers:
    """A network on this worker's device, which is loaded when it is asked for the first time."""

    def __init__(
        self, load: Callable[[], MoDE], count: int, temperature: float, device: torch.device | None = None
    ) -> None:
        self._load, self._count, self._temperature = load, count, temperature
        self._device = device or torch.device("cpu")

    @cached_property
    def _network(self) -> MoDE:
        return self._load().to(self._device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, sequence: Batch) -> TopLogits:
        h_TD, _ = hidden_states(self._network, sequence.to(self._device))
        head = self._network.lm_head.weight
        parts = [
            keep_top(torch.nn.functional.linear(h, head), self._count, temperature=self._temperature)
            for h in h_TD.split(CHUNK_TOKENS)
        ]
        return TopLogits(
            torch.cat([part.ids_TN for part in parts]).cpu(),
            torch.cat([part.log_probs_TN for part in parts]).cpu(),
            self._temperature,
        )


@dataclass(frozen=True)
class _Segment:
    """One document's part of a sequence: its place, and its tokens, with the one after its last target."""

    start: int
    tokens: list[int]


class EndpointAnswers:
    """A running vLLM server (OpenAI's completions with vLLM's `prompt_logprobs`), at temperature 1.

    Documents are asked for one by one, because a server would let them see one another. A server that is away is tried
    again for `patience_s`; UpstreamFailed for an answer that is none.
    """

    def __init__(
        self,
        endpoint: TeacherEndpoint,
        count: int,
        vocab_size: int,
        *,
        patience_s: float = 300.0,
        client: httpx.Client | None = None,
    ) -> None:
        self._endpoint, self._count, self._vocab_size, self._patience_s = endpoint, count, vocab_size, patience_s
        headers = {}
        if endpoint.key_from is not None:
            key = os.environ.get(endpoint.key_from)
            if not key:
                raise InvalidValue(
                    f"The teacher {endpoint.model} wants a key from ${endpoint.key_from}, which is not set.",
                    hint="Set it in the environment of the workers.",
                )
            headers["Authorization"] = f"Bearer {key}"
        self._headers = headers
        self._client = client or httpx.Client(timeout=_ANSWER_S)

    def __call__(self, sequence: Batch) -> TopLogits:
        segments = list(_segments(sequence))
        length = sequence.ids_BS.shape[1]
        ids = torch.zeros(length, self._count, dtype=torch.int32)
        log_probs = torch.zeros(length, self._count)
        with ThreadPoolExecutor(self._endpoint.requests_at_once) as pool:
            for segment, rows in zip(segments, pool.map(self._ask_for, segments), strict=True):
                for place, row in enumerate(rows, segment.start):
                    ids[place], log_probs[place] = torch.tensor(row[0], dtype=torch.int32), torch.tensor(row[1])
        return TopLogits(ids, log_probs, 1.0)

    def _ask_for(self, segment: _Segment) -> list[tuple[list[int], list[float]]]:
        body = {
            "model": self._endpoint.model,
            "prompt": segment.tokens,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": self._count,
        }
        attempts = Retrying(
            retry=retry_if_exception_type((httpx.TransportError, _Busy)),
            wait=wait_exponential_jitter(multiplier=0.5, max=15, jitter=0.5),
            stop=stop_after_delay(self._patience_s),
            reraise=True,
        )
        try:
            answer = attempts(self._post, body)
        except (httpx.TransportError, _Busy) as error:
            raise UpstreamFailed(
                f"The teacher at {self._endpoint.base_url} did not answer in {self._patience_s:,.0f} s: {error}",
                hint="What it said so far is kept: run the job again when it is up.",
            ) from error
        try:
            positions = answer["choices"][0]["prompt_logprobs"]
            if len(positions) != len(segment.tokens):
                raise ValueError(f"{len(positions)} positions for {len(segment.tokens)} tokens")
            return [self._best(position) for position in positions[1:]]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UpstreamFailed(
                f"The teacher at {self._endpoint.base_url} gave no usable prompt_logprobs: {error!r}.",
                hint="It must be vLLM's OpenAI server, with --max-logprobs of at least top_logits.",
            ) from None

    def _post(self, body: dict[str, Any]) -> Any:
        url = f"{self._endpoint.base_url.rstrip('/')}/completions"
        answer = self._client.post(url, json=body, headers=self._headers)
        if answer.status_code == 429 or answer.status_code >= 500:
            raise _Busy(f"status {answer.status_code}")
        if answer.status_code != 200:
            raise UpstreamFailed(
                f"The teacher at {self._endpoint.base_url} refused: status {answer.status_code}, {answer.text[:300]}",
                hint="Check the model's name, the key, and the server's --max-logprobs.",
            )
        return answer.json()

    def _best(self, position: dict[str, Any]) -> tuple[list[int], list[float]]:
        """The N likeliest, the first first. A server adds the prompt's own token when that is not among them."""
        best = sorted((entry["rank"], int(token), float(entry["logprob"])) for token, entry in position.items())
        best = best[: self._count]
        if len(best) < self._count or best[-1][0] > self._count:
            raise ValueError(f"{len(best)} of the {self._count} likeliest tokens")
        if max(token for _, token, _ in best) >= self._vocab_size:
            raise ValueError(f"a token beyond the student's vocabulary of {self._vocab_size:,}")
        return [token for _, token, _ in best], [log_prob for _, _, log_prob in best]


class _Busy(Exception):
    """The server cannot answer now."""


def _segments(sequence: Batch) -> Iterator[_Segment]:
    """Those with a target. `sequence` is one row; the token that its last position predicts is known by its label."""
    ids, labels, documents = (_list(part) for part in (sequence.ids_BS, sequence.labels_BS, sequence.document_BS))
    start = 0
    for place in range(1, len(ids) + 1):
        if place < len(ids) and documents[place] == documents[start]:
            continue
        last = labels[place - 1]
        tokens = ids[start:place] + ([last] if last != IGNORED else [])
        if len(tokens) > 1:
            yield _Segment(start, tokens)
        start = place


def _list(row_1S: Tensor) -> list[int]:
    found: list[int] = row_1S[0].tolist()
    return found
