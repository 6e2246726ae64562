"""The object store in an S3 bucket: Amazon's, or any server that speaks S3 with conditional puts.

Credentials and region come from where boto3 looks for them (environment, profile, instance role). An upload that dies
leaves the parts of an unfinished multipart upload: give the bucket a lifecycle rule that aborts those after some days.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypedDict

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from zenray.spec.errors import StorageUnavailable
from zenray.storage.base import ObjectInfo, ObjectStore, OnBytes, check_key, check_range, missing
from zenray.storage.transfer import read_expected

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

_IMMUTABLE_CACHE_CONTROL = "max-age=31536000, immutable"
_MUTABLE_CACHE_CONTROL = "no-cache"
_SHA256_METADATA = "sha256"
_ATTEMPTS = 5
_LEAST_PART_BYTES = 8 << 20
_MOST_PARTS = 10_000
_PARALLEL_PARTS = 8
_CONNECTIONS = 16
_BODY_ERRORS = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError, ConnectionError, HTTPClientError)


class _Where(TypedDict):
    Bucket: str
    Key: str


class _Described(TypedDict):
    CacheControl: str
    Metadata: dict[str, str]


class S3Store(ObjectStore):
    """Objects under `prefix` (no slashes at its ends; may be empty) of `bucket`, which must exist."""

    def __init__(self, bucket: str, prefix: str = "", *, endpoint_url: str | None = None) -> None:
        self._bucket = bucket
        self._prefix = f"{check_key(prefix)}/" if prefix else ""
        self._endpoint_url = endpoint_url
        session = boto3.session.Session()
        self._client: S3Client = session.client(
            "s3",
            endpoint_url=endpoint_url,
            region_name=session.region_name or "us-east-1",
            config=Config(
                retries={"mode": "standard", "max_attempts": _ATTEMPTS},
                connect_timeout=10,
                read_timeout=60,
                max_pool_connections=_CONNECTIONS,
                tcp_keepalive=True,
                s3={"addressing_style": "path" if endpoint_url else "auto"},
            ),
        )

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def put_bytes(self, key: str, data: bytes, *, immutable: bool = False) -> None:
        with self._explained(key):
            self._client.put_object(
                Bucket=self._bucket,
                Key=self._key(key),
                Body=data,
                ChecksumAlgorithm="SHA256",
                CacheControl=_cache_control(immutable),
            )

    def put_file(
        self, key: str, path: Path, *, sha256: str, immutable: bool = False, on_bytes: OnBytes | None = None
    ) -> None:
        blocks = read_expected(path, sha256, _part_bytes(path.stat().st_size))
        first = next(blocks, b"")
        second = next(blocks, None)
        described: _Described = {"CacheControl": _cache_control(immutable), "Metadata": {_SHA256_METADATA: sha256}}
        if second is None:  # read to its end, so its digest is checked
            with self._explained(key):
                self._client.put_object(
                    Bucket=self._bucket, Key=self._key(key), Body=first, ChecksumAlgorithm="SHA256", **described
                )
            if on_bytes:
                on_bytes(len(first))
        else:
            self._put_parts(key, itertools.chain((first, second), blocks), described, on_bytes)

    def _put_parts(self, key: str, parts: Iterator[bytes], described: _Described, on_bytes: OnBytes | None) -> None:
        """A multipart upload, completed only once `parts` ended without an error; aborted otherwise."""
        where: _Where = {"Bucket": self._bucket, "Key": self._key(key)}
        with self._explained(key):
            begun = self._client.create_multipart_upload(**where, ChecksumAlgorithm="SHA256", **described)
            upload_id = begun["UploadId"]
            try:
                with ThreadPoolExecutor(_PARALLEL_PARTS) as executor:

                    def send(number: int, part: bytes) -> CompletedPartTypeDef:
                        answer = self._client.upload_part(
                            **where, UploadId=upload_id, PartNumber=number, Body=part, ChecksumAlgorithm="SHA256"
                        )
                        if on_bytes:
                            on_bytes(len(part))
                        return {
                            "PartNumber": number,
                            "ETag": answer["ETag"],
                            "ChecksumSHA256": answer["ChecksumSHA256"],
                        }

                    done: list[CompletedPartTypeDef] = []
                    waiting: deque[Future[CompletedPartTypeDef]] = deque()
                    for number, part in enumerate(parts, start=1):
                        waiting.append(executor.submit(send, number, part))
                        if len(waiting) > _PARALLEL_PARTS:  # bounds the memory
                            done.append(waiting.popleft().result())
                    done += [future.result() for future in waiting]
                self._complete(key, where, upload_id, done, described)
            except BaseException:
                with suppress(BotoCoreError, ClientError):
                    self._client.abort_multipart_upload(**where, UploadId=upload_id)
                raise

    def _complete(
        self, key: str, where: _Where, upload_id: str, parts: list[CompletedPartTypeDef], described: _Described
    ) -> None:
        try:
            self._client.complete_multipart_upload(**where, UploadId=upload_id, MultipartUpload={"Parts": parts})
        except ClientError as error:
            # The answer to a first attempt may have been lost, and boto3 then asked again: look what is there.
            info = self.head(key) if error.response["Error"]["Code"] == "NoSuchUpload" else None
            if info is None or info.sha256 != described["Metadata"][_SHA256_METADATA]:
                raise

    def put_if_absent(self, key: str, data: bytes, *, immutable: bool = False) -> bool:
        for attempt in range(_ATTEMPTS):
            with self._explained(key):
                try:
                    self._client.put_object(
                        Bucket=self._bucket,
                        Key=self._key(key),
                        Body=data,
                        ChecksumAlgorithm="SHA256",
                        CacheControl=_cache_control(immutable),
                        IfNoneMatch="*",
                    )
                except ClientError as error:
                    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                    if status == 412:
                        return False
                    if status != 409 or attempt == _ATTEMPTS - 1:  # 409: another conditional put is under way
                        raise
                    time.sleep(0.05 * 2**attempt)
                    continue
                return True
        raise AssertionError("unreachable")

    def get_bytes(self, key: str) -> bytes:
        return self._read(key, None)

    def get_range(self, key: str, start_bytes: int, length_bytes: int) -> bytes:
        check_range(start_bytes, length_bytes)
        if length_bytes == 0:  # HTTP has no empty range; a missing object is an error all the same
            if self.head(key) is None:
                raise missing(self, key)
            return b""
        return self._read(key, f"bytes={start_bytes}-{start_bytes + length_bytes - 1}")

    def _read(self, key: str, byte_range: str | None) -> bytes:
        """boto3 repeats a failed request, but not the reading of a body that breaks off: that is repeated here."""
        full_key = self._key(key)
        for attempt in range(_ATTEMPTS):
            with self._explained(key):
                try:
                    answer = (
                        self._client.get_object(Bucket=self._bucket, Key=full_key, Range=byte_range)
                        if byte_range
                        else self._client.get_object(Bucket=self._bucket, Key=full_key)
                    )
                    return answer["Body"].read()
                except ClientError as error:
                    code = error.response["Error"]["Code"]
                    if code in ("InvalidRange", "416"):
                        return b""
                    if code in ("NoSuchKey", "404"):
                        raise missing(self, key) from None
                    raise
                except _BODY_ERRORS:
                    if attempt == _ATTEMPTS - 1:
                        raise
                    time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable")

    def head(self, key: str) -> ObjectInfo | None:
        with self._explained(key):
            try:
                answer = self._client.head_object(Bucket=self._bucket, Key=self._key(key))
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    return None
                raise
            return ObjectInfo(key, answer["ContentLength"], answer["Metadata"].get(_SHA256_METADATA))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        with self._explained(prefix):
            for page in pages:
                for item in page.get("Contents", []):
                    yield ObjectInfo(item["Key"].removeprefix(self._prefix), item["Size"])

    def delete(self, key: str) -> None:
        with self._explained(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(key))

    def _key(self, key: str) -> str:
        return self._prefix + check_key(key)

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError):
            raise StorageUnavailable(
                f"{self.uri}: no credentials for S3.",
                hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role.",
            ) from None
        except ClientError as error:
            self._refused(key, error)
        except BotoCoreError as error:
            where = self._endpoint_url or "Amazon S3"
            raise StorageUnavailable(
                f"{self.uri}: {key!r}: {error}", hint=f"Is {where} up, and reachable from this machine?"
            ) from error

    def _refused(self, key: str, error: ClientError) -> NoReturn:
        code = error.response["Error"]["Code"]
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        hint = f"The S3 server answered {status}."
        if code == "NoSuchBucket":
            hint = f"Make the bucket {self._bucket!r} first, or correct the storage uri."
        elif status in (401, 403):
            hint = "Check the credentials, and that they may list, read and write in this bucket."
        raise StorageUnavailable(f"{self.uri}: {key!r}: {code}.", hint=hint) from error


def _cache_control(immutable: bool) -> str:
    return _IMMUTABLE_CACHE_CONTROL if immutable else _MUTABLE_CACHE_CONTROL


def _part_bytes(size_bytes: int) -> int:
    """The least size of a part with which a file of this size needs no more parts than S3 takes."""
    return max(_LEAST_PART_BYTES, -(-size_bytes // _MOST_PARTS))
