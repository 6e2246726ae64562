"""The store as a pyarrow file system, for what reads and writes by that interface: Ray Train, Ray Data, Parquet.

It travels between processes as an address. Each process builds the real file system itself, with the credentials of its
own environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or the machine's role): pyarrow would pickle the secret.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileSystemHandler

from zenray.spec.errors import InvalidDocument

_CONNECT_S, _REQUEST_S = 5, 60
_ATTEMPTS = 12  # at growing intervals: about a minute, which a store may be away


def arrow_filesystem(uri: str, endpoint_url: str | None = None) -> tuple[FileSystem, str]:
    """(file system, path on it) of `file:/absolute/path` or `s3://BUCKET[/PREFIX]`. Touches neither disk nor network.

    `endpoint_url`: of an S3 server other than Amazon's. The file system may be pickled; no secret is in it. Its errors
    are OSError. Raises InvalidDocument for any other uri.
    """
    scheme, _, rest = uri.partition(":")
    if scheme == "file" and rest:
        path = Path(rest.removeprefix("//") if rest.startswith("///") else rest)
        if path.is_absolute():
            return pyarrow.fs.LocalFileSystem(), str(path)
    parts = urlsplit(uri)
    if parts.scheme == "s3" and parts.netloc and not parts.query and not parts.fragment:
        path_on_it = "/".join(filter(None, (parts.netloc, parts.path.strip("/"))))
        return pyarrow.fs.PyFileSystem(_S3Handler(endpoint_url)), path_on_it
    raise InvalidDocument(f"{uri!r} names no file system.", hint="Write file:/absolute/path or s3://BUCKET/PREFIX.")


@lru_cache(maxsize=8)
def _s3(endpoint_url: str | None, process: int) -> FileSystem:
    """One for each process (`process`: its id): arrow's threads do not survive a fork."""
    options: dict[str, Any] = {
        "connect_timeout": _CONNECT_S,
        "request_timeout": _REQUEST_S,
        "retry_strategy": pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    }
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options["region"] = region
    if endpoint_url:
        parts = urlsplit(endpoint_url)
        options |= {"endpoint_override": parts.netloc + parts.path.rstrip("/"), "scheme": parts.scheme}
        options.setdefault("region", "us-east-1")  # or arrow asks Amazon where the bucket is
    return pyarrow.fs.S3FileSystem(**options)


class _S3Handler(FileSystemHandler):  # type: ignore[misc]
    """S3 at an endpoint, built when first used, in whatever process that is."""

    def __init__(self, endpoint_url: str | None) -> None:
        self._endpoint_url = endpoint_url

    def __reduce__(self) -> tuple[type[_S3Handler], tuple[str | None]]:
        return type(self), (self._endpoint_url,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _S3Handler) and other._endpoint_url == self._endpoint_url

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._endpoint_url)

    @property
    def _real(self) -> FileSystem:
        return _s3(self._endpoint_url, os.getpid())

    def get_type_name(self) -> str:
        return "zenray-s3"

    def normalize_path(self, path: str) -> str:
        return str(self._real.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        found: list[FileInfo] = self._real.get_file_info(paths)
        return found

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        found: list[FileInfo] = self._real.get_file_info(selector)
        return found

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: S3 has no folders, and an object that stands for one is in the way of other programs."""

    def delete_dir(self, path: str) -> None:
        self._real.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._real.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise OSError("refusing to empty every bucket")

    def delete_file(self, path: str) -> None:
        self._real.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._real.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._real.copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        return self._real.open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        return self._real.open_input_file(path)

    def open_output_stream(self, path: str, metadata: dict[str, str]) -> Any:
        return self._real.open_output_stream(path, metadata=metadata)

    def open_append_stream(self, path: str, metadata: dict[str, str]) -> Any:
        raise OSError("S3 cannot append to an object")
