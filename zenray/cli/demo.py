"""`make demo`: the whole journey on this machine, with a real model, from nothing to a paid answer.

Gets SmolLM2-135M-Instruct, publishes it as a model version, starts Ray, control and gateway, deploys the model on Ray
Serve and vLLM, makes an organisation with credit and a key, and asks two questions with the unmodified `openai` client.
Then it makes a mixture of experts out of the model, distils it for a few steps on Ray Train, deploys and asks that too,
and prints what all of it cost. Ends everything it started. What was fetched and made stays for the next run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import openai
import yaml
from rich.panel import Panel
from rich.text import Text

from zenray.cli.client import ControlClient
from zenray.cli.commands.accounts import wait_until_known
from zenray.cli.home import Home, RunningPlatform
from zenray.cli.output import console, errors, show_error, show_facts, show_table
from zenray.spec.documents import load_document
from zenray.spec.errors import Unavailable, ZenrayError
from zenray.spec.money import format_usd
from zenray.spec.platform import Platform

MODEL = "smollm2-135m"
MIXTURE = "smollm2-mode"
MIXTURE_JOB = Path("jobs/mode-smollm2-short.yaml")
MIXTURE_DEPLOYMENT = """
model: smollm2-mode
version: short-distilled
engine: {dtype: bfloat16, max_model_len: 512, max_num_seqs: 4, kv_cache_bytes: 134217728}
"""
CREDIT_USD = "1.00"
LEDGER_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Answer:
    """One question's way through the platform."""

    how: str
    model: str
    question: str
    text: str
    input_tokens: int
    output_tokens: int
    first_token_s: float | None
    took_s: float


def main() -> None:
    os.environ.setdefault("ZENRAY_HOME", ".zenray/demo")
    home = Home.from_environment()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # by way of every `finally`
    try:
        _run(home)
    except (ZenrayError, OSError) as error:
        show_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except openai.OpenAIError as error:
        errors.print(f"[bold red]error:[/bold red] the gateway did not answer as it should: {error}")
        sys.exit(1)


def _run(home: Home) -> None:
    began_s = time.monotonic()
    platform_file = _platform_file(home)
    try:
        _zenray("up", "-f", str(platform_file), "--detach")
        running = home.running()
        _say(began_s, f"{MODEL} answers")
        org, key = _make_customer(ControlClient.connect(home))
        wait_until_known(running.gateway_url, key)
        client = openai.OpenAI(base_url=f"{running.gateway_url}/v1", api_key=key)
        answers = [
            _ask_whole(client, "What is the capital of France?"),
            _ask_streamed(client, "Write two sentences about the sea."),
        ]
        _say(began_s, f"{MODEL} has answered; now a mixture of experts is made of it")
        _zenray("run", str(MIXTURE_JOB), "--follow")
        deployment = home.root / "mixture.yaml"
        deployment.write_text(MIXTURE_DEPLOYMENT, encoding="utf-8")
        _zenray("deploy", str(deployment))
        _say(began_s, f"{MIXTURE} answers")
        answers.append(_ask_whole(client, "What is the capital of France?", MIXTURE))
        _report(running, answers, _wait_for_ledger(ControlClient.connect(home), org, len(answers)))
    finally:
        _zenray("down")
    _say(began_s, "done; `zenray up` starts a platform that stays")


def _say(began_s: float, what: str) -> None:
    console.print(f"[dim]{time.monotonic() - began_s:5.1f} s[/dim]  {what}")


def _platform_file(home: Home) -> Path:
    """clusters/local.yaml with free ports, so that the demo runs beside whatever else runs here."""
    text = Path("clusters/local.yaml").read_text(encoding="utf-8")
    load_document(Path("clusters/local.yaml"), Platform)
    document = yaml.safe_load(text)
    document["name"] = "demo"
    document["ray"] |= {"gcs_port": 0, "dashboard_port": 0, "serve_port": 0}
    document["control"] |= {"port": 0}
    document["gateway"] |= {"port": 0}
    home.root.mkdir(parents=True, exist_ok=True)
    path = home.root / "platform.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def _zenray(*arguments: str) -> None:
    """Run the command. When we are to end meanwhile, it first takes back what it began."""
    command = subprocess.Popen([sys.executable, "-m", "zenray.cli.main", *arguments])
    try:
        code = command.wait()
    except BaseException as why:
        if not isinstance(why, KeyboardInterrupt):  # Ctrl-C has reached it already
            command.send_signal(signal.SIGINT)
        command.wait()
        raise
    if code:
        raise Unavailable(f"`zenray {' '.join(arguments)}` failed (exit {code}); it said why above.")


def _make_customer(control: ControlClient) -> tuple[str, str]:
    """A fresh organisation with credit, and a key that may ask the two models only."""
    org = f"demo-{int(time.time())}"
    control.post("/admin/orgs", {"name": org})
    control.post(f"/admin/orgs/{org}/credits", {"amount_usd": CREDIT_USD, "note": "demo"})
    key = control.post("/admin/keys", {"org": org, "scopes": [MODEL, MIXTURE], "name": "demo"})
    return org, key["key"]


def _ask_whole(client: openai.OpenAI, question: str, model: str = MODEL) -> Answer:
    began_s = time.monotonic()
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=64, temperature=0
    )
    assert answer.usage is not None
    return Answer(
        "whole",
        model,
        question,
        answer.choices[0].message.content or "",
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
        None,
        time.monotonic() - began_s,
    )


def _ask_streamed(client: openai.OpenAI, question: str) -> Answer:
    began_s = time.monotonic()
    text, usage, first_token_s = "", None, None
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=96,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            first_token_s = first_token_s or time.monotonic() - began_s
            text += piece
    if usage is None:
        raise Unavailable("The stream ended without usage, although it was asked for.")
    took_s = time.monotonic() - began_s
    return Answer(
        "streamed", MODEL, question, text, usage.prompt_tokens, usage.completion_tokens, first_token_s, took_s
    )


def _wait_for_ledger(control: ControlClient, org: str, requests: int) -> tuple[int, int]:
    """Cost and balance of `org` in nano-dollars, as soon as the ledger has all its requests."""
    deadline_s = time.monotonic() + LEDGER_TIMEOUT_S
    while time.monotonic() < deadline_s:
        rows = control.get("/admin/usage", org=org, group_by="model")["data"]
        if sum(row["requests"] for row in rows) == requests:
            balance = control.get(f"/admin/orgs/{org}/balance")["balance_nano_usd"]
            return sum(row["cost_nano_usd"] for row in rows), balance
        time.sleep(0.2)
    raise Unavailable(f"The ledger did not show {requests} requests within {LEDGER_TIMEOUT_S:.0f} s.")


def _report(running: RunningPlatform, answers: list[Answer], money: tuple[int, int]) -> None:
    cost_nano_usd, balance_nano_usd = money
    for answer in answers:
        title = f"{answer.model}: {answer.question} ({answer.how})"
        console.print(Panel(Text(answer.text.strip()), title=title, title_align="left"))
    show_table(
        ["model", "answer", "#input tokens", "#output tokens", "#first token", "#in all", "#tokens/s"],
        [
            [
                answer.model,
                answer.how,
                answer.input_tokens,
                answer.output_tokens,
                f"{answer.first_token_s * 1000:.0f} ms" if answer.first_token_s else "",
                f"{answer.took_s:.2f} s",
                f"{answer.output_tokens / answer.took_s:.0f}",
            ]
            for answer in answers
        ],
    )
    console.print()
    show_facts(
        {
            "cost of all": format_usd(cost_nano_usd),
            "balance left": f"{format_usd(balance_nano_usd)} of ${CREDIT_USD}",
            "gateway": f"{running.gateway_url}/v1",
            "API docs": f"{running.gateway_url}/docs",
            "Ray dashboard": running.dashboard_url,
        }
    )


if __name__ == "__main__":
    main()
