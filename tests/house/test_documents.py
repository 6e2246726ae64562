"""What is written beside the code is true: versions, links, make targets, data files, and no place of one machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import zenray
from tests.house.test_shape import ROOT, relative, tracked
from zenray.spec.documents import load_document
from zenray.spec.jobs import load_job
from zenray.spec.platform import Platform

MARKDOWN = tracked("*.md")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MACHINE_PATHS = re.compile(r"/(?:home|root|Users|work|farm)/\w|\.(?:library|mirror)/")


def test_the_changelogs_newest_entry_is_the_packages_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", text, re.MULTILINE)
    assert versions and versions[0] == zenray.__version__


def test_no_tracked_file_names_a_place_of_one_machine():
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{relative(path)}: {match.group()}" for match in MACHINE_PATHS.finditer(text)]
    assert not found, found


def test_there_is_markdown_to_look_at():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md"} <= {relative(p) for p in MARKDOWN}


@pytest.mark.parametrize("page", MARKDOWN, ids=relative)
def test_links_lead_to_files_that_exist(page: Path):
    targets = [link.split("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8"))]
    local = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    dead = [target for target in local if not (page.parent / target).exists()]
    assert not dead, f"{relative(page)} links to {dead}"


@pytest.mark.parametrize("page", MARKDOWN, ids=relative)
def test_make_targets_in_the_text_exist(page: Path):
    targets = set(re.findall(r"^([a-z0-9-]+(?: [a-z0-9-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {word for names in targets for word in names.split()}
    named = set(re.findall(r"(?:`|^\s*(?:\$ )?)make ([a-z][a-z0-9-]*)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= known, f"{relative(page)} names make targets that do not exist: {sorted(named - known)}"


def test_there_is_a_cluster_file():
    assert tracked("clusters/*.yaml")


@pytest.mark.parametrize("path", tracked("clusters/*.yaml"), ids=relative)
def test_cluster_files_load(path: Path):
    platform = load_document(path, Platform)
    assert platform.name == path.stem, "a cluster file is named like the cluster"


@pytest.mark.parametrize("path", tracked("jobs/*.yaml"), ids=relative)
def test_job_files_load(path: Path):
    assert load_job(path).model_dump()["name"] == path.stem, "a job file is named like the job"


@pytest.mark.parametrize("page", tracked("docs/decisions/[0-9]*.md"), ids=relative)
def test_a_decision_has_its_four_parts(page: Path):
    heads = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)
    assert heads == ["Context", "Decision", "Consequences", "Alternatives"]
