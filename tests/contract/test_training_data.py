"""Text in a real S3 server, tokenised by real Ray Data: the tokens are those that one process makes of local files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from tests.cluster.ray_session import new_home
from tests.contract.seaweedfs import ACCESS_KEY, SECRET_KEY, S3Server, seaweedfs
from tests.contract.training_platform import LOOPBACK, REPOSITORY
from tests.training.tiny import END, job, write_text, write_version
from zenray.spec.training import DataSource, TrainingData
from zenray.training.data.documents import identity, read_documents, text_entries
from zenray.training.data.tokens import prepare

pytestmark = pytest.mark.contract

TOKENISE = """
import sys, ray
from pathlib import Path
from zenray.spec.training import TrainingData
from zenray.storage.arrow import arrow_filesystem
from zenray.training.data.shards import tokenise_on_cluster
from zenray.training.data.tokens import prepare
data, tokenizer, end, uri, endpoint, cache = sys.argv[1:]
data, tokenizer = TrainingData.model_validate_json(data), Path(tokenizer)
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
filesystem, folder = arrow_filesystem(uri, endpoint)
shards = tokenise_on_cluster(data, tokenizer, int(end), filesystem, folder)
again = tokenise_on_cluster(data, tokenizer, int(end), filesystem, folder)
assert again == shards
prepare(data, tokenizer, int(end), 0, Path(cache), shards)
"""


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    with seaweedfs() as server:
        yield server


@pytest.fixture
def in_s3(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TrainingData, TrainingData]:
    """The same two domains twice: as local files, and in the bucket."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    client = boto3.client("s3", endpoint_url=s3_server.endpoint_url, region_name="us-east-1")
    text = write_text(tmp_path / "text")
    (tmp_path / "text" / "deeper").mkdir()
    text["spell"].rename(tmp_path / "text" / "deeper" / "spell.jsonl")
    for path in sorted((tmp_path / "text").rglob("*.jsonl")):
        key = f"{tmp_path.name}/{path.relative_to(tmp_path / 'text')}"
        client.put_object(Bucket=s3_server.bucket, Key=key, Body=path.read_bytes())
    base = f"s3://{s3_server.bucket}/{tmp_path.name}"
    local = {"all": tmp_path / "text", "one": tmp_path / "text" / "count.jsonl"}
    sources = [
        {"domain": domain, "path": f"{base}{end}", "endpoint_url": s3_server.endpoint_url}
        for domain, end in (("all", ""), ("one", "/count.jsonl"))
    ]
    data = job(local).data
    return data, data.model_copy(update={"sources": tuple(DataSource(**source) for source in sources)})


def test_text_in_s3_reads_as_text_in_a_folder(in_s3: tuple[TrainingData, TrainingData]) -> None:
    for here, there in zip(in_s3[0].sources, in_s3[1].sources, strict=True):
        assert list(read_documents(there)) == list(read_documents(here))
        assert identity(there, text_entries(there)) == identity(here, text_entries(here))


def test_ray_data_makes_the_tokens_that_one_process_makes(
    in_s3: tuple[TrainingData, TrainingData], s3_server: S3Server, tmp_path: Path
) -> None:
    here, there = in_s3
    tokenizer = write_version(tmp_path / "base") / "tokenizer.json"
    alone = prepare(here, tokenizer, END, 0, tmp_path / "alone").folder
    home = new_home()
    uri = f"s3://{s3_server.bucket}/{tmp_path.name}-tokens"
    arguments = [there.model_dump_json(), tokenizer, END, uri, s3_server.endpoint_url, tmp_path / "cluster"]
    subprocess.run(
        [sys.executable, "-c", TOKENISE, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "RAY_TMPDIR": str(home), "PYTHONPATH": str(REPOSITORY), **LOOPBACK},
        check=True,
        timeout=240,
    )
    made = tmp_path / "cluster" / alone.name
    names = sorted(path.name for path in alone.iterdir())
    assert names == sorted(path.name for path in made.iterdir())
    assert all((made / name).read_bytes() == (alone / name).read_bytes() for name in names)
    subprocess.run(["rm", "-rf", str(home)], check=True)
