"""The file system by which others reach the store: an address, never a secret."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow.fs
import pytest

from zenray.spec.errors import InvalidDocument
from zenray.storage.arrow import arrow_filesystem


def test_a_folder_is_a_local_file_system(tmp_path: Path) -> None:
    filesystem, path = arrow_filesystem(f"file:{tmp_path}")
    assert isinstance(filesystem, pyarrow.fs.LocalFileSystem) and path == str(tmp_path)
    assert arrow_filesystem(f"file://{tmp_path}")[1] == str(tmp_path)


def test_s3_travels_without_a_secret_and_is_the_same_at_the_other_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    filesystem, path = arrow_filesystem("s3://bucket/deep/prefix/", "http://127.0.0.1:9")
    assert path == "bucket/deep/prefix"
    assert filesystem.normalize_path("bucket/x") == "bucket/x"  # builds the real one, which knows the secret
    sent = pickle.dumps(filesystem)
    assert b"the-secret" not in sent and b"the-key-id" not in sent
    assert pickle.loads(sent) == filesystem  # noqa: S301
    assert arrow_filesystem("s3://bucket", "http://127.0.0.1:10")[0] != filesystem


@pytest.mark.parametrize("uri", ["file:relative", "s3://", "gs://bucket", "plain", "s3://bucket/x?y=1"])
def test_another_uri_is_refused(uri: str) -> None:
    with pytest.raises(InvalidDocument, match=r"Write file:/absolute/path or s3://BUCKET/PREFIX"):
        arrow_filesystem(uri)
