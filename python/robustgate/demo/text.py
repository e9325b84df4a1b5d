"""Real text that every Python installation carries, in five clearly different domains.

=============  =====================================================  ==========================
domain         text                                                   source (never in two splits)
=============  =====================================================  ==========================
``python``     standard library, comments and docstrings removed      a file
``docstrings`` English technical prose out of the same files          the same file
``manual``     the language reference behind ``help()``               a topic
``unicode``    code point, category and name of every character       256 code points
``cpp``        C++ headers that torch carries                         a file
=============  =====================================================  ==========================

A slim installation may lack one of them; each has a fallback, and a domain without text is left
out. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import io
import random
import re
import sys
import sysconfig
import tokenize
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Reader = Callable[[random.Random], Iterator[tuple[str, str]]]
"""Takes a random generator, yields ``(source name, text)`` in an order drawn from it."""

_NOT_PROSE_OR_CODE = {"encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests"}
_INSTALLED_LATER = {"dist-packages", "site-packages", "__pycache__"}
_GENERATED_HEADERS = {"ops"}


def split_python(text: str) -> tuple[str, tuple[str, ...]]:
    """Separate a Python source into its code and its docstrings.

    A docstring here is any string that stands as a statement of its own.

    Args:
        text: Python source.

    Returns:
        The code without comments and docstrings, and the docstrings without indentation.

    Raises:
        SyntaxError: ``text`` is not Python.

    Example:
        >>> split_python("'Prose.'\\nx = 1  # one\\n")
        ('x = 1\\n', ('Prose.',))
    """
    lines = text.splitlines(keepends=True)
    docstrings: list[str] = []
    cuts: list[tuple[tuple[int, int], tuple[int, int]]] = []
    statement_begins = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            cuts.append((token.start, token.end))
        elif token.type == tokenize.STRING and statement_begins:
            cuts.append((token.start, token.end))
            value = ast.literal_eval(token.string)
            if isinstance(value, str):
                docstrings.append(inspect.cleandoc(value))
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            statement_begins = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for (first, begin), (last, end) in reversed(cuts):
        lines[first - 1 : last] = [lines[first - 1][:begin] + lines[last - 1][end:]]
    code = "".join(line.rstrip() + "\n" for line in lines)
    return re.sub(r"\n{3,}", "\n\n", code).strip("\n") + "\n", tuple(docstrings)


def python_code(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield standard-library files without comments and docstrings."""
    for name, text in _python_files(rng):
        yield name, split_python(text)[0]


def python_docstrings(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield the prose paragraphs of the standard library's docstrings, one text per file."""
    for name, text in _python_files(rng):
        paragraphs = "\n\n".join(split_python(text)[1]).split("\n\n")
        prose = [p for p in paragraphs if ">>>" not in p and len(p.split()) >= 8]
        if prose:
            yield name, "\n\n".join(prose)


def language_manual(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield the topics of Python's language reference; without them, docstrings of C modules."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        topics = dict(_compiled_docstrings())
    yield from _shuffled(((f"manual/{name}", text) for name, text in topics.items()), rng)


def character_names(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield lines of code point, category and name, 256 code points a text, 16 a paragraph.

    Ideographs and Hangul syllables are left out: their names only repeat the code point or the
    sound.
    """
    rows: dict[int, list[str]] = {}
    for point in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(point), "")
        if name and "IDEOGRAPH-" not in name and not name.startswith("HANGUL SYLLABLE"):
            line = f"{point:04X} {unicodedata.category(chr(point))} {name}"
            rows.setdefault(point >> 4, []).append(line)
    blocks: dict[int, list[str]] = {}
    for row, lines in rows.items():
        blocks.setdefault(row >> 4, []).append("\n".join(lines))
    texts = ((f"unicode/{block:02X}xx", "\n\n".join(text)) for block, text in blocks.items())
    yield from _shuffled(texts, rng)


def cpp_headers(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield torch's C++ headers; where torch carries none, those of numpy and of Python."""
    folders = [_package_folder("torch") / "include"]
    if not folders[0].is_dir():
        numpy_include = importlib.import_module("numpy").get_include()
        folders = [Path(numpy_include), Path(sysconfig.get_path("include"))]
    files = [
        (f"{folder.name}/{path.relative_to(folder)}", path)
        for folder in folders
        for path in _walk(folder, (".h", ".hpp", ".cuh"), skip=_GENERATED_HEADERS)
    ]
    yield from _read(_shuffled(files, rng))


DOMAINS: dict[str, Reader] = {
    "python": python_code,
    "docstrings": python_docstrings,
    "manual": language_manual,
    "unicode": character_names,
    "cpp": cpp_headers,
}
"""Every domain of the demo with its reader."""


def _python_files(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield the standard library's sources; where it lies in an archive, torch's."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = _walk(folder, (".py",), skip=_NOT_PROSE_OR_CODE | _INSTALLED_LATER)
    if not files:
        folder = _package_folder("torch")
        files = _walk(folder, (".py",), skip=_NOT_PROSE_OR_CODE | _INSTALLED_LATER)
    named = [(f"lib/{path.relative_to(folder)}", path) for path in files]
    for name, text in _read(_shuffled(named, rng)):
        try:
            ast.parse(text)
        except SyntaxError:  # templates and files of other versions are no corpus
            continue
        yield name, text


def _compiled_docstrings() -> Iterator[tuple[str, str]]:
    """Yield the docstrings of built-in classes and of modules compiled from C."""
    modules = [builtins, *(importlib.import_module(n) for n in ("math", "itertools", "numpy"))]
    objects = [
        (f"{module.__name__}.{name}", getattr(module, name))
        for module in modules
        for name in sorted(vars(module))
        if not name.startswith("_")
    ]
    for name, thing in objects:
        members = vars(thing).values() if isinstance(thing, type) else ()
        texts = [inspect.getdoc(item) or "" for item in (thing, *members)]
        text = "\n\n".join(dict.fromkeys(t for t in texts if len(t) > 100))
        if text:
            yield name, text


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return Path("missing", package)
    return Path(spec.origin).parent


def _walk(folder: Path, suffixes: tuple[str, ...], skip: set[str]) -> list[Path]:
    """Return the files below ``folder`` with one of the suffixes, outside the skipped folders."""
    found: list[Path] = []
    pending = [folder]
    while pending:
        current = pending.pop()
        if not current.is_dir():
            continue
        for entry in current.iterdir():
            if entry.is_dir() and entry.name not in skip:
                pending.append(entry)
            elif entry.suffix in suffixes:
                found.append(entry)
    return sorted(found)


def _read(files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, str]]:
    for name, path in files:
        try:
            yield name, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # an unreadable file is no corpus
            continue


def _shuffled(items: Iterable[tuple[str, T]], rng: random.Random) -> list[tuple[str, T]]:
    """Return the items in an order that depends on their names and the generator alone."""
    ordered = sorted(items, key=lambda item: item[0])
    rng.shuffle(ordered)
    return ordered
