"""The admin token (operators) and the edge token (gateways): one secret each, in a file that only its owner reads."""

import hmac
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

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

    def check(self, token: str | None) -> None:
        if not token:
            raise InvalidApiKey(f"This needs the {self._what}.", hint="Send it as 'Authorization: Bearer TOKEN'.")
        if not hmac.compare_digest(token.encode(), self._token):
            raise InvalidApiKey(f"That is not the {self._what}.")

    def dependency(self) -> Callable[..., None]:
        """For routes behind this door; it also puts the door into the API's documentation."""
        scheme = HTTPBearer(auto_error=False, scheme_name=self._what)

        def admit(given: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)] = None) -> None:
            self.check(given.credentials if given else None)

        return admit
