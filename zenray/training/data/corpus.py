"""A small real corpus that every machine has: code, prose and mathematics, out of installed packages."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from zenray.spec.errors import NotFound
from zenray.spec.training import BuiltinCorpus

SELECTION = 1  # changed when other texts are chosen
SHORTEST_CHARACTERS = 200
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data", "turtledemo"}


def builtin_documents(name: BuiltinCorpus) -> Iterator[str]:
    """Texts in a fixed order, none shorter than 200 characters; the same for one set of installed packages."""
    source = {"code": _library_modules, "prose": _manual_topics, "mathematics": _sympy_documentation}[name]
    return (text for text in source() if len(text) >= SHORTEST_CHARACTERS)


def builtin_version(name: BuiltinCorpus) -> str:
    """Names the texts of a corpus: the versions of what they come from, and of how they are chosen."""
    if name == "mathematics":
        return f"{name}:{SELECTION}:sympy-{importlib.metadata.version('sympy')}"
    return f"{name}:{SELECTION}:python-{platform.python_version()}"


def _library_modules() -> Iterator[str]:
    """Every module of Python's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _python_files(root):
        yield path.read_text(encoding="utf-8", errors="replace")


def _manual_topics() -> Iterator[str]:
    """The chapters of Python's language reference that `help()` shows."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].strip()


def _sympy_documentation() -> Iterator[str]:
    """The docstrings of sympy: definitions, theorems and worked examples."""
    found = importlib.util.find_spec("sympy")
    if found is None or found.origin is None:
        raise NotFound("The corpus of mathematics needs sympy.", hint="pip install sympy")
    for path in _python_files(Path(found.origin).parent):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text


def _python_files(root: Path) -> list[Path]:
    found = (path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())
