"""From the storage settings of a platform file to an object store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from zenray.spec.errors import InvalidDocument
from zenray.spec.platform import StorageSettings
from zenray.storage.base import ObjectStore


def open_store(settings: StorageSettings, home: Path | None = None) -> ObjectStore:
    """The store that `settings` names. Touches neither disk nor network: a store that is away shows at first use.

    `home`: the platform's folder, to which a relative `file:` path belongs; None: the path must be absolute.
    Raises InvalidDocument for a uri that is neither `file:PATH` nor `s3://BUCKET[/PREFIX]`.
    """
    scheme, _, rest = settings.uri.partition(":")
    if scheme == "file" and rest:
        from zenray.storage.local import LocalStore

        path = Path(rest.removeprefix("//") if rest.startswith("///") else rest).expanduser()
        if not path.is_absolute():
            if home is None:
                raise InvalidDocument(f"storage.uri: {settings.uri!r} is relative.", hint="Write file:/absolute/path.")
            path = home / path
        return LocalStore(path)
    parts = urlsplit(settings.uri)
    if parts.scheme == "s3" and parts.netloc and not parts.query and not parts.fragment:
        from zenray.storage.s3 import S3Store  # boto3 takes a third of a second to import

        return S3Store(parts.netloc, parts.path.strip("/"), endpoint_url=settings.endpoint_url)
    raise InvalidDocument(
        f"storage.uri: {settings.uri!r} names no store.", hint="Write file:PATH or s3://BUCKET/PREFIX."
    )


def absolute(settings: StorageSettings, home: Path) -> StorageSettings:
    """The same store, named so that another process in another folder finds it."""
    if not settings.uri.startswith("file:"):
        return settings
    return settings.model_copy(update={"uri": open_store(settings, home).uri})
