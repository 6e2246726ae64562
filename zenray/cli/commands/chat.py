"""Talk to a model through the gateway, as any client would."""

from __future__ import annotations

import os
import sys
import time

import openai
from openai.types.chat import ChatCompletionMessageParam

from zenray.cli.home import Home
from zenray.cli.output import console
from zenray.spec.errors import InvalidApiKey, ZenrayError


class ChatRefused(ZenrayError):
    """What the gateway answered instead of tokens."""

    code = "chat_refused"


def chat(model: str) -> None:
    """Talk to MODEL. Reads questions from the terminal (or one from standard input) until an empty line or Ctrl-D."""
    client = _client()
    if not sys.stdin.isatty():
        _answer(client, model, [{"role": "user", "content": sys.stdin.read().strip()}])
        return
    console.print(f"[dim]{model}; an empty line ends.[/dim]")
    messages: list[ChatCompletionMessageParam] = []
    while True:
        try:
            question = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if not question:
            return
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": _answer(client, model, messages)})


def _client() -> openai.OpenAI:
    key = os.environ.get("ZENRAY_API_KEY")
    if not key:
        raise InvalidApiKey(
            "ZENRAY_API_KEY is not set.", hint="Make a key: export ZENRAY_API_KEY=$(zenray keys create ORG)"
        )
    url = os.environ.get("ZENRAY_GATEWAY_URL") or Home.from_environment().running().gateway_url
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key)


def _answer(client: openai.OpenAI, model: str, messages: list[ChatCompletionMessageParam]) -> str:
    """Stream one answer to the terminal; returns its text."""
    began_s = time.monotonic()
    text, usage = "", None
    try:
        stream = client.chat.completions.create(
            model=model,
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.usage:
                usage = chunk.usage
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece:
                text += piece
                console.print(piece, end="", markup=False)
    except openai.APIStatusError as error:
        raise ChatRefused(str(error.body["message"] if isinstance(error.body, dict) else error)) from None
    except openai.OpenAIError as error:
        raise ChatRefused(f"The answer broke off: {error}") from None
    took_s = time.monotonic() - began_s
    console.print()
    if usage:
        rate = usage.completion_tokens / took_s if took_s else 0.0
        console.print(f"[dim]{usage.prompt_tokens} + {usage.completion_tokens} tokens, {rate:.0f} tokens/s[/dim]")
    return text
