"""Clients that go on asking while a deployment is changed under them, and what became of each request."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import openai
import yaml

from tests.e2e.platform import TestPlatform, wait_until


@dataclass
class Asked:
    """One request: whole with so many tokens, or broken off with an error."""

    tokens: int = 0
    error: Exception | None = None


@dataclass
class Load:
    """Workers that ask one after the other, as many at a time as `clients` says just now."""

    client: openai.OpenAI
    model: str
    prompt: str
    max_tokens: int | None = None
    clients: int = 0
    answers: list[Asked] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def ask(self) -> Asked:
        """One streamed request, to its end."""
        asked = Asked()
        try:
            stream = self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": self.prompt}],
                max_tokens=self.max_tokens or openai.NOT_GIVEN,
                temperature=0,  # a sampled answer may end early
                stream=True,
                stream_options={"include_usage": True},
            )
            for chunk in stream:
                if chunk.usage is not None:
                    asked.tokens = chunk.usage.completion_tokens
        except Exception as error:  # a failed request is what the tests count, whatever it failed with
            asked.error = error
        self.answers.append(asked)
        return asked

    def failed(self) -> list[Exception]:
        return [asked.error for asked in self.answers if asked.error is not None]

    @contextmanager
    def running(self, most: int) -> Iterator[Load]:
        """`most` workers; worker n asks while `clients` > n. At the end all of them finish what they have begun."""

        def work(number: int) -> None:
            while not self._over.is_set():
                if number < self.clients:
                    self.ask()
                else:
                    time.sleep(0.02)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(most)]
        for worker in workers:
            worker.start()
        try:
            yield self
        finally:
            self._over.set()
            for worker in workers:
                worker.join()


def deploy(platform: TestPlatform, **spec: object) -> str:
    """`zenray deploy` of this spec; what it said. AssertionError when it failed."""
    path = platform.home.root / f"{spec['model']}-{time.monotonic_ns()}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return platform.zenray("deploy", str(path), timeout_s=600)


def endpoints(platform: TestPlatform, model: str) -> list[str]:
    """The replicas that gateways are told to ask."""
    found: list[str] = platform.control().get(f"/admin/deployments/{model}")["endpoints"]
    return found


def wait_for_replicas(platform: TestPlatform, model: str, count: int, within_s: float = 180) -> list[str]:
    try:
        return wait_until(
            lambda: [found] if len(found := endpoints(platform, model)) == count else None,
            f"{model} has {count} replicas",
            within_s,
        )[0]
    except AssertionError as error:
        said = platform.control().get(f"/admin/deployments/{model}")
        raise AssertionError(f"{error}\n{json.dumps(said, indent=1)}\n{_serve_log(platform)}") from None


def _serve_log(platform: TestPlatform, last_bytes: int = 6000) -> str:
    """The end of what Serve's controller wrote: why a replica did not come, or was not asked for."""
    logs = sorted((platform.home.root / "ray").glob("**/logs/serve/controller_*.log"))
    return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-last_bytes:]}" for log in logs)


def wait_for_answers(load: Load, more: int, within_s: float = 180) -> None:
    """Until so many more requests have come to their end."""
    enough = len(load.answers) + more
    condition: Callable[[], bool] = lambda: len(load.answers) >= enough  # noqa: E731
    wait_until(condition, f"{more} more answers", within_s)
