"""What a gateway tells control of a canary: a real gateway, and engines that break when asked to."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests.gateway.running import KEY, Engine, FakeControl, RunningGateway, route, until
from zenray.spec.edge import CanaryRoute, Endpoint

pytestmark = [pytest.mark.contract, pytest.mark.asyncio]
TRIAL = ("tiny--2", 7.0)


def canary(url: str) -> CanaryRoute:
    ends = (Endpoint(replica_id="new#0", url=url),)
    return CanaryRoute(revision=TRIAL[0], since=TRIAL[1], weight=1 - 1e-12, endpoints=ends, engine_key="engine-key")


async def test_what_breaks_is_counted_and_what_is_the_client_s_own_fault_is_not(tmp_path: Path) -> None:
    control = FakeControl()
    control.add_key(KEY)
    good, trial = await Engine.start(), await Engine.start()
    control.routes["tiny"] = route("tiny", [good.url]).model_copy(update={"canary": canary(trial.url)})
    control.publish()
    await control.start()
    gateway = await RunningGateway(tmp_path, control).start()
    client = gateway.client()

    async def ask(words: str, *, stream: bool) -> str:
        try:
            answer = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": words}], stream=stream
            )
            if stream:
                _ = [chunk async for chunk in answer]
        except openai.APIError as error:
            return type(error).__name__
        return "whole"

    try:
        assert await ask("[[fail_after=2 fail=cut]]", stream=True) == "APIError"
        await until(lambda: control.canaries.get(TRIAL) == (1, 1), timeout_s=60)
        assert await ask("hello", stream=True) == "whole"
        assert await ask("[[status=422]]", stream=False) == "BadRequestError"
        await until(lambda: control.canaries.get(TRIAL) == (3, 1), timeout_s=60)
        assert await ask("[[status=500]]", stream=False) == "InternalServerError"
        await until(lambda: control.canaries.get(TRIAL) == (4, 2), timeout_s=60)
        await trial.stop()
        assert await ask("hello", stream=False) == "whole"  # by the old revision, in its place
        await until(lambda: control.canaries.get(TRIAL) == (5, 3), timeout_s=60)
        control.set_route(route("tiny", [good.url]))
        assert await ask("hello", stream=False) == "whole"
    finally:
        await client.close()
        await gateway.stop()
        await good.stop()
        await trial.stop()
        await control.stop()
