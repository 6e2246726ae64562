"""The shape of the code: sizes, names, docstrings, and where each layer of tests lies."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES = 600
FUNCTION_LINES = 60
FORBIDDEN = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
TRIVIAL_LINES = 24
LAYERS = ("contract", "parity", "e2e")

MODULES = sorted((ROOT / "zenray").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository that match; empty folders and rubbish beside them do not count."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def own_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function without its docstring, and without the functions in it: those count for themselves."""
    lines = {number for part in ast.walk(node) for number in _span(part)} | set(_span(node))
    inner = [one for one in functions(node) if one is not node]
    for one in [*inner, *(node.body[:1] if ast.get_docstring(node) else [])]:
        lines -= set(_span(one))
    return len(lines)


def _span(node: ast.AST) -> range:
    return range(getattr(node, "lineno", 0), getattr(node, "end_lineno", -1) + 1)


def test_no_file_is_longer_than_the_cap():
    long = {relative(path): n for path in MODULES if (n := path.read_text().count("\n")) > FILE_LINES}
    assert not long, f"over {FILE_LINES} lines; split by noun: {long}"


def test_no_function_is_longer_than_the_cap():
    long = {
        f"{relative(path)}:{node.lineno} {node.name}": lines
        for path, tree in TREES.items()
        for node in functions(tree)
        if (lines := own_lines(node)) > FUNCTION_LINES
    }
    assert not long, f"over {FUNCTION_LINES} lines: {long}"


def test_no_module_has_a_name_that_says_nothing():
    parts = {relative(path): {*path.relative_to(ROOT).parts[:-1], path.stem} for path in MODULES}
    bad = [name for name, words in parts.items() if words & FORBIDDEN]
    assert not bad, f"a helper lives in the lowest package that owns its noun: {bad}"


def test_every_module_says_its_purpose_in_one_line():
    bad = []
    for path, tree in TREES.items():
        lines = (ast.get_docstring(tree) or "").splitlines()
        if not lines or (len(lines) > 1 and lines[1].strip()):
            bad.append(relative(path))
    assert not bad, f"the module's docstring begins with one line, then a blank one: {bad}"


def test_public_functions_too_long_to_be_plain_have_a_contract():
    """A public function or method of more than two dozen lines says what it promises: shapes, units, errors.

    Shorter ones may speak for themselves. A method that implements a seam has its contract in the package's base.py.
    """
    bad = []
    for path, tree in TREES.items():
        if path.name == "__main__.py":
            continue  # what `main` does is the module's purpose
        base = TREES.get(path.parent / "base.py")
        promised = {node.name for node in functions(base) if ast.get_docstring(node)} if base else set()
        owners = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
        for node in [node for owner in owners for node in owner.body]:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            lines = own_lines(node)
            if lines > TRIVIAL_LINES and node.name not in promised and not ast.get_docstring(node):
                bad.append(f"{relative(path)}:{node.lineno} {node.name} ({lines} lines)")
    assert not bad, "write what it promises:\n" + "\n".join(bad)


def test_no_docstring_restates_the_name():
    bad = []
    for path, tree in TREES.items():
        for node in functions(tree):
            said = re.findall(r"[a-z0-9]+", (ast.get_docstring(node) or "").lower())
            name = re.findall(r"[a-z0-9]+", node.name.lower())
            if said and [word for word in said if word not in {"the", "a", "an", "of", "this"}] == name:
                bad.append(f"{relative(path)}:{node.lineno} {node.name}")
    assert not bad, f"say more than the name, or nothing: {bad}"


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layers_files_carry_its_marker(layer: str):
    files = [path for path in tracked(f"tests/{layer}/*.py") if path.name.startswith("test_")]
    bad = [
        relative(path)
        for path in files
        if not re.search(rf"^pytestmark\b[^\n]*(\n[^\n]*)*?mark\.{layer}\b", path.read_text(), re.MULTILINE)
    ]
    assert not bad, f"write `pytestmark = pytest.mark.{layer}` in {bad}"


def test_every_folder_of_tests_is_a_package():
    """Without `__init__.py` two test files of one name in two folders cannot be collected together."""
    folders = {path.parent for path in tracked("tests/*.py") if path.name.startswith("test_")}
    assert not [relative(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_no_work_is_left_for_later_in_comments():
    word = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    found = [
        f"{relative(path)}:{number}"
        for path in tracked("*.py", "*.sh", "*.yaml", "Makefile")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if word.search(line)
    ]
    assert not found, found
