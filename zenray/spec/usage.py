"""A usage event: what one request used, as the gateway saw it, to be billed once (HIP-39 "Usage Tracking")."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from zenray.spec.money import Price


class Outcome(StrEnum):
    """How a request ended. Whatever the end, the tokens counted in the event are billed."""

    COMPLETED = "completed"
    CLIENT_GONE = "client_gone"  # the client disconnected; the engine was told, the last running usage counts
    UPSTREAM_FAILED = "upstream_failed"  # the replica died or answered with an error
    INTERRUPTED = "interrupted"  # the gateway died; the usage is what the stream's slot held


class Usage(BaseModel):
    """Token counts. `cached_input_tokens` is a part of `input_tokens`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input_tokens: int = Field(0, ge=0)
    cached_input_tokens: int = Field(0, ge=0)
    output_tokens: int = Field(0, ge=0)


class UsageEvent(BaseModel):
    """One billed request. `billing_key` is unique for ever: gateway id, boot id, sequence number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    billing_key: str
    request_id: str
    attempt: int = 1
    org: str
    user_id: str | None = None
    key_id: str
    model_asked: str
    model_answered: str
    adapter: str | None = None
    quantization: str | None = None
    usage: Usage
    price: Price
    latency_ms: float | None = None
    ttft_ms: float | None = None
    finish_reason: str | None = None
    outcome: Outcome
    at: float = Field(description="Seconds since the epoch when the request was opened.")

    def cost_nano_usd(self) -> int:
        return self.price.cost_nano_usd(
            self.usage.input_tokens, self.usage.cached_input_tokens, self.usage.output_tokens
        )
