"""Control's admin API, as the commands use it."""

from __future__ import annotations

import os
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from zenray.cli.home import Home
from zenray.spec.errors import Unavailable, ZenrayError

AWAY_S = 120.0


class ControlError(ZenrayError):
    """What control answered when it refused."""

    code = "control_error"


class ControlClient:
    """Asks control. Address and token come from `$ZENRAY_CONTROL_URL` and `$ZENRAY_ADMIN_TOKEN`, else from the home."""

    def __init__(self, url: str, admin_token: str) -> None:
        self._url = url
        self._http = httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {admin_token}"}, timeout=30.0, trust_env=False
        )

    @classmethod
    def connect(cls, home: Home) -> ControlClient:
        url = os.environ.get("ZENRAY_CONTROL_URL") or home.running().control_url
        token = os.environ.get("ZENRAY_ADMIN_TOKEN")
        if token is None:
            try:
                token = home.admin_token_file.read_text().strip()
            except OSError as error:
                raise Unavailable(
                    f"The admin token cannot be read: {error}.",
                    hint="Run as the user who started the platform, or set ZENRAY_ADMIN_TOKEN.",
                ) from None
        return cls(url, token)

    def get(self, path: str, **params: Any) -> Any:
        return self._ask("GET", path, params={k: v for k, v in params.items() if v is not None})

    def get_patiently(self, path: str, **params: Any) -> Any:
        """`get` for those who watch something: control may go away and come back. Unavailable after AWAY_S."""
        patience = Retrying(
            retry=retry_if_exception_type(Unavailable),
            stop=stop_after_delay(AWAY_S),
            wait=wait_fixed(0.5),
            reraise=True,
        )
        return patience(self.get, path, **params)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._ask("POST", path, json=body or {})

    def put(self, path: str, body: dict[str, Any]) -> Any:
        return self._ask("PUT", path, json=body)

    def delete(self, path: str) -> Any:
        return self._ask("DELETE", path)

    def _ask(self, method: str, path: str, **how: Any) -> Any:
        try:
            answer = self._http.request(method, path, **how)
        except httpx.HTTPError as error:
            raise Unavailable(
                f"Control at {self._url} does not answer: {error}.", hint="`zenray status` shows what runs."
            ) from None
        if answer.is_error:
            raise ControlError(_message(answer))
        return answer.json() if answer.content else None


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"control answered {answer.status_code}: {answer.text[:200]}"
