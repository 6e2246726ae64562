"""Real text that is on every machine: the source code of Python packages, and the English in their docstrings.

A package is `stdlib` (with the language reference of `pydoc_data`) or any importable one. Tests are left out. Whether a
file is held out depends on its name alone: the tenth whose hash says so, in every run.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zenray.spec.errors import NotFound
from zenray.storage.base import Progress

Kind = Literal["code", "english"]

DEFAULT_PACKAGES = ("stdlib", "sympy")
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_TOPICS = "pydoc_data"
_MIN_CHARACTERS = 400
_HELD_OUT_SHARE = 10


@dataclass(frozen=True)
class Document:
    source: str
    kind: Kind
    text: str

    @property
    def is_held_out(self) -> bool:
        name = self.source.partition("#")[0]
        return hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def read_packages(packages: Sequence[str] = DEFAULT_PACKAGES, *, progress: Progress | None = None) -> list[Document]:
    """Every document of the packages, each text once. Progress phase "read". Raises NotFound for an unknown package."""
    roots = {name: _root(name) for name in packages}
    paths = [(name, path) for name, root in roots.items() for path in _sources(root)]
    total_bytes, done_bytes = sum(path.stat().st_size for _, path in paths), 0
    documents = list(_topics()) if "stdlib" in packages else []
    for name, path in paths:
        documents.extend(_of_file(f"{name}/{path.relative_to(roots[name]).as_posix()}", path))
        done_bytes += path.stat().st_size
        if progress:
            progress("read", done_bytes, total_bytes)
    return list({document.text: document for document in documents}.values())


def training_texts(documents: Iterable[Document]) -> list[str]:
    """What may be learned from."""
    return [document.text for document in documents if not document.is_held_out]


def held_out(documents: Iterable[Document], kind: Kind) -> list[str]:
    """What nothing was learned from, for measuring."""
    return [document.text for document in documents if document.is_held_out and document.kind == kind]


def _root(package: str) -> Path:
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None or Path(spec.origin).name != "__init__.py":
        raise NotFound(f"No package {package!r} with Python sources is installed.", hint="Name `stdlib` or a package.")
    return Path(spec.origin).parent


def _sources(root: Path) -> list[Path]:
    found = root.rglob("*.py")
    return sorted(
        p for p in found if not _LEFT_OUT.intersection(p.relative_to(root).parts) and p.parent.name != _TOPICS
    )


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        if len(text) >= _MIN_CHARACTERS:
            yield Document(f"{_TOPICS}/{name}", "english", text)


def _of_file(source: str, path: Path) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):  # a package's own samples of broken files
        return
    if len(text) >= _MIN_CHARACTERS:
        yield Document(source, "code", text)
        prose = docstring_prose(text)
        if len(prose) >= _MIN_CHARACTERS:
            yield Document(f"{source}#docstrings", "english", prose)


def docstring_prose(code: str) -> str:
    """The docstrings of a source file without their examples; empty when it does not parse on this Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders)]
    return "\n\n".join(filter(None, (_without_examples(text) for text in docstrings if text))) + "\n"


def _without_examples(docstring: str) -> str:
    """Paragraphs as they are, except those that begin with a prompt, up to their end: the output is below the input."""
    paragraphs = docstring.split("\n\n")
    return "\n\n".join(one for one in paragraphs if not one.lstrip().startswith((">>>", "..."))).strip()


def python_version() -> str:
    """The texts are this Python's: said beside what was measured on them."""
    return ".".join(map(str, sys.version_info[:3]))
