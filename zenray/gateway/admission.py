"""Who asks, for what, and how much it may cost: pure decisions, made before any engine is asked.

The bound on a request's input is its length in bytes: a byte-level tokenizer never makes more tokens than bytes, and
every character of the rendered prompt stands in the body, but for what the template adds (`template_overhead_tokens`)
and for tools, which templates write out again as indented JSON (`_RENDERED_AGAIN`).

What happens where the byte bound is too coarse:

- A client that asked for `max_tokens` keeps it, even where bound and `max_tokens` together pass the context: only the
  engine knows the true length, and it refuses with `context_length_exceeded` by itself, before it computes anything.
- A client that did not ask gets the model's default; where the bound says that this may not fit, the prompt is
  tokenised, since an engine would refuse a `max_tokens` that the client never sent.
- A balance that does not cover the bound is asked again with the true length.
- What an image or a recording costs is known to the engine alone, after it has encoded them: a request with any is
  bound by the whole context, and the engine's count is billed. Its text is bound by bytes as any, so that there is
  room for the output that the engine is told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from zenray.gateway.snapshot import Directory, Key, Route
from zenray.spec.edge import RouteState
from zenray.spec.errors import (
    ContextLengthExceeded,
    InsufficientQuota,
    InvalidApiKey,
    InvalidRequest,
    InvalidValue,
    ModelNotFound,
    ModelNotReady,
    ScopeDenied,
    suggest,
)
from zenray.spec.openai import CHAT, COMPLETION, DEFAULT_COMPLETION_TOKENS, MAX_CHOICES, PART_MODALITIES, Shape

_RENDERED_AGAIN = 4
_LOADING_RETRY_S = 5


class Endpoint(StrEnum):
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"

    @property
    def shape(self) -> Shape:
        return CHAT if self is Endpoint.CHAT else COMPLETION


@dataclass(slots=True)
class Asked:
    """A request whose body has been read and checked."""

    endpoint: Endpoint
    body: dict[str, Any]
    body_bytes: int
    model: str
    stream: bool
    include_usage: bool
    prompts: int
    choices_per_prompt: int
    max_tokens: int | None  # None: the client left it to us
    media_bytes: int = 0  # of the body, in image and audio parts

    @property
    def choices(self) -> int:
        return self.prompts * self.choices_per_prompt


@dataclass(slots=True)
class Bounds:
    """What a request may use at most. `exact_input`: the input was tokenised, so that nothing finer can be known."""

    input_tokens: int
    max_tokens: int
    exact_input: bool


def authenticate(authorization: bytes | None, directory: Directory, now: float, key_prefix: str) -> Key:
    """The key that a request carries. Raises InvalidApiKey (401); the message never repeats the key.

    Keys are looked up by their SHA-256, so the time of a failed look-up says nothing about any key.
    """
    if not authorization:
        raise InvalidApiKey(
            "You didn't provide an API key.", hint="Send it as a header: 'Authorization: Bearer YOUR_KEY'."
        )
    scheme, _, secret = authorization.partition(b" ")
    secret = secret.strip()
    if scheme.lower() != b"bearer" or not secret:
        raise InvalidApiKey("The Authorization header is not 'Bearer YOUR_KEY'.")
    digest = hashlib.sha256(secret).hexdigest()
    key = directory.keys.get(digest)
    if key is None:
        hint = f"Keys begin with '{key_prefix}'." if not secret.startswith(key_prefix.encode()) else None
        raise InvalidApiKey("Incorrect API key provided.", hint=hint or "It may have been deleted.")
    entry = key.entry
    if entry.revoked:
        raise InvalidApiKey(f"The API key {entry.key_id} has been revoked.", hint="Create another one.")
    if entry.expires_at is not None and entry.expires_at <= now:
        raise InvalidApiKey(f"The API key {entry.key_id} has expired.", hint="Create another one.")
    return key


def find_route(model: str, key: Key, directory: Directory) -> Route:
    """The route of a model that `key` may use, in any state. Raises ModelNotFound (404) or ScopeDenied (403)."""
    route = directory.routes.get(model)
    if route is None:
        visible = [one.entry.model for one in directory.visible_to(key)]
        raise ModelNotFound(
            f"The model '{model[:128]}' does not exist.", hint=suggest(model[:128], visible), param="model"
        )
    if not key.allows(model):
        raise ScopeDenied(
            f"This API key may not use the model '{model}'.",
            hint=f"Its scopes are: {', '.join(key.entry.scopes) or 'none'}.",
            param="model",
        )
    return route


def check_ready(route: Route) -> None:
    """Raises ModelNotReady (503) unless the route takes requests, now or once it is woken."""
    entry = route.entry
    if entry.state is RouteState.READY:
        return
    if entry.state is RouteState.ASLEEP:
        if entry.wake_url is None:
            raise ModelNotReady(f"The model '{entry.model}' is asleep.", hint="Retry.", retry_after_s=_LOADING_RETRY_S)
        return
    if entry.state is RouteState.LOADING:
        raise ModelNotReady(
            f"The model '{entry.model}' is still loading.", hint="Retry.", retry_after_s=_LOADING_RETRY_S
        )
    raise ModelNotReady(
        f"The model '{entry.model}' failed to start: {entry.message or 'no reason known'}.",
        hint="Its operator has to repair it.",
        retry_after_s=60,
    )


def read_request(endpoint: Endpoint, raw: bytes) -> Asked:
    """Parse and check a body. Raises InvalidRequest, InvalidValue or UnknownField (400), naming the field."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        # The decoder's message may quote the document, so only the position is passed on.
        raise InvalidRequest(f"The body is not valid JSON (line {error.lineno}, column {error.colno}).") from None
    if type(body) is not dict:
        raise InvalidRequest("The body must be a JSON object.")
    endpoint.shape.check(body)
    stream = body.get("stream") is True
    options = body.get("stream_options")
    if options is not None and not stream:
        raise InvalidValue("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    if endpoint is Endpoint.CHAT:
        prompts, max_tokens = 1, _chat_max_tokens(body)
    else:
        prompts, max_tokens = _completion_prompts(body), _completion_max_tokens(body)
    choices_per_prompt = body.get("n") or 1
    if prompts * choices_per_prompt > MAX_CHOICES:
        raise InvalidValue(
            f"{prompts} prompts with n={choices_per_prompt} ask for {prompts * choices_per_prompt} answers; "
            f"{MAX_CHOICES} are allowed at once.",
            param="prompt",
        )
    return Asked(
        endpoint=endpoint,
        body=body,
        body_bytes=len(raw),
        model=body["model"],
        stream=stream,
        include_usage=stream and options is not None and options.get("include_usage") is True,
        prompts=prompts,
        choices_per_prompt=choices_per_prompt,
        max_tokens=max_tokens,
    )


def _chat_max_tokens(body: Mapping[str, Any]) -> int | None:
    old, new = body.get("max_tokens"), body.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise InvalidValue(
            f"'max_tokens' ({old}) and 'max_completion_tokens' ({new}) differ.",
            hint="Send one of them.",
            param="max_tokens",
        )
    if body.get("top_logprobs") is not None and not body.get("logprobs"):
        raise InvalidValue("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    if body.get("tool_choice") not in (None, "none") and not body.get("tools"):
        raise InvalidValue("'tool_choice' is only allowed when 'tools' are given.", param="tool_choice")
    return new if new is not None else old


def _completion_max_tokens(body: Mapping[str, Any]) -> int:
    asked: int | None = body.get("max_tokens")
    if asked == 0 and not body.get("echo"):
        raise InvalidValue("'max_tokens' may be 0 only with 'echo': true.", param="max_tokens")
    return DEFAULT_COMPLETION_TOKENS if asked is None else asked


def _completion_prompts(body: Mapping[str, Any]) -> int:
    prompt = body["prompt"]
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def check_modalities(asked: Asked, route: Route, others: Mapping[str, tuple[str, ...]]) -> None:
    """Notes how many bytes are images and recordings. Raises InvalidValue (400) for one that the model does not take.

    `others`: the modalities of the models that the key may see, to name those that would.
    """
    if asked.endpoint is not Endpoint.CHAT:
        return
    for index, message in enumerate(asked.body["messages"]):
        content = message.get("content")
        if type(content) is not list:
            continue
        for place, part in enumerate(content):
            kind = part["type"]
            needed = PART_MODALITIES.get(kind)
            if needed is None:
                continue
            where = f"messages[{index}].content[{place}]"
            if needed not in route.entry.modalities:
                able = [name for name, modalities in others.items() if needed in modalities]
                raise InvalidValue(
                    f"The model '{asked.model}' does not take '{kind}' parts.",
                    hint=f"Models that do: {', '.join(able)}." if able else "No model here does.",
                    param=where,
                )
            if kind == "image_url" and not part["image_url"]["url"].startswith("data:image/"):
                # The engine would fetch it, from inside of the network that it stands in.
                raise InvalidValue(
                    "An image must come with the request.",
                    hint="Send it as a data URL: 'data:image/png;base64,…'.",
                    param=f"{where}.image_url.url",
                )
            asked.media_bytes += len(part["image_url"]["url"] if kind == "image_url" else part["input_audio"]["data"])


def input_bound_tokens(asked: Asked, route: Route) -> int:
    """At least the tokens of one prompt, from bytes; never more than the context, which an engine enforces.

    Of images and recordings only their places in the text.
    """
    extra_bytes = -asked.media_bytes
    if asked.endpoint is Endpoint.CHAT:
        tools = asked.body.get("tools")
        if tools:
            extra_bytes += _RENDERED_AGAIN * len(orjson.dumps(tools))
        for message in asked.body["messages"]:
            calls = message.get("tool_calls")
            if calls:
                extra_bytes += _RENDERED_AGAIN * len(orjson.dumps(calls))
    entry = route.entry
    return min(asked.body_bytes + extra_bytes + entry.template_overhead_tokens, entry.context_tokens)


def bound(asked: Asked, route: Route, *, exact_input_tokens: int | None = None) -> Bounds | None:
    """Bounds on input and output. None: the prompt must be tokenised first.

    Raises ContextLengthExceeded (400) when the output that was asked for, or the exact input, cannot fit.
    """
    entry = route.entry
    context = entry.context_tokens
    if asked.max_tokens is not None and asked.max_tokens >= context:
        raise ContextLengthExceeded(
            f"'max_tokens' is {asked.max_tokens}; this model's maximum context length is {context} tokens, "
            "input and output together.",
            hint="Ask for fewer tokens.",
            param="max_tokens",
        )
    exact = exact_input_tokens is not None
    input_tokens = input_bound_tokens(asked, route) if exact_input_tokens is None else exact_input_tokens
    # The engine is told no more than the text leaves; what the images then take, it takes off by itself.
    left = context - input_tokens
    if exact and input_tokens + max(1, asked.max_tokens or 0) > context:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. However, your request has {input_tokens} input "
            f"tokens and asks for {asked.max_tokens or 'at least 1'} output tokens.",
            hint="Shorten the input or ask for less.",
            param="messages" if asked.endpoint is Endpoint.CHAT else "prompt",
        )
    if asked.media_bytes:
        input_tokens = context
    if asked.max_tokens is not None:
        return Bounds(input_tokens, asked.max_tokens, exact)
    if left < entry.default_max_tokens and not exact:
        return None
    return Bounds(input_tokens, min(entry.default_max_tokens, left), exact)


def reserve_nano_usd(asked: Asked, route: Route, bounds: Bounds) -> int:
    """The worst that the request can cost. `max_tokens` 0 makes an engine compute one token all the same."""
    return route.bound_nano_usd(asked.choices, bounds.input_tokens, max(1, bounds.max_tokens))


def fit_to_credit(asked: Asked, route: Route, bounds: Bounds, available_nano_usd: int) -> Bounds | None:
    """The same request with an output that `available_nano_usd` covers; None: not even one token."""
    affordable = route.output_tokens_for(available_nano_usd, asked.choices, bounds.input_tokens)
    if affordable is None:
        return bounds
    if affordable < 1:
        return None
    return Bounds(bounds.input_tokens, min(bounds.max_tokens, affordable), bounds.exact_input)


def no_credit(org: str, needed_nano_usd: int, available_nano_usd: int) -> InsufficientQuota:
    from zenray.spec.money import format_usd

    return InsufficientQuota(
        f"You exceeded your current quota: this request may cost {format_usd(needed_nano_usd)}, and the organisation "
        f"'{org}' has {format_usd(max(0, available_nano_usd))} left for it.",
        hint="Add credit, or ask for fewer tokens.",
    )


def engine_body(asked: Asked, route: Route, bounds: Bounds, cache_salt: str) -> bytes:
    """What the engine is sent: the checked fields, our bounds, and what metering and separation of tenants need."""
    body = asked.endpoint.shape.forwarded(asked.body)
    body["model"] = route.entry.upstream_model
    body.pop("max_completion_tokens", None)
    body["max_tokens"] = bounds.max_tokens
    body["cache_salt"] = cache_salt
    if asked.stream:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return orjson.dumps(body)


def tokenize_body(asked: Asked, route: Route, prompt: Any = None) -> bytes:
    """A request for the engine's /tokenize: the chat, or one `prompt` of a completion."""
    body: dict[str, Any] = {"model": route.entry.upstream_model}
    if asked.endpoint is Endpoint.CHAT:
        body["messages"] = asked.body["messages"]
        if asked.body.get("tools"):
            body["tools"] = asked.body["tools"]
    else:
        body["prompt"] = prompt
    return orjson.dumps(body)
