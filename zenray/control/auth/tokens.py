"""The admin token (operators) and the edge token (gateways): one secret each, in a file that only its owner reads."""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

from zenray.spec.errors import InvalidApiKey, InvalidDocument

MIN_TOKEN_CHARACTERS = 16


def load_token(path: Path) -> str:
    """The token in `path`; made, with mode 600, if there is no such file. InvalidDocument if it is too short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        token = path.read_text(encoding="ascii").strip()
        if len(token) < MIN_TOKEN_CHARACTERS:
            raise InvalidDocument(
                f"{path}: the token has {len(token)} characters, fewer than {MIN_TOKEN_CHARACTERS}.",
                hint="Delete the file and a new one is made at the next start.",
            ) from None
        return token
    token = secrets.token_urlsafe(36)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(token + "\n")
    return token


class TokenDoor:
    """Lets in whoever sends `Authorization: Bearer <token>`; the comparison takes the same time for every guess."""

    def __init__(self, token: str, *, what: str) -> None:
        self._token = token.encode()
        self._what = what

    def check(self, authorization: str | None) -> None:
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise InvalidApiKey(f"This needs the {self._what}.", hint="Send it as 'Authorization: Bearer TOKEN'.")
        if not hmac.compare_digest(given.strip().encode(), self._token):
            raise InvalidApiKey(f"That is not the {self._what}.")
