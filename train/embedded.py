"""The embedded corpus: the running Python's standard library. It is real text, on every machine, without a network."""

import ast
import gc
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.util import decode_source
from pathlib import Path

from anchor_attn.train.items import Found, Skipped

MIN_BYTES = 200
MAX_BYTES = 2_000
NOT_STDLIB = frozenset({"site-packages", "dist-packages"})


def read_stdlib(root: Path | None = None) -> Iterator[Found | Skipped]:
    """Every top-level function and class of 200 to 2,000 UTF-8 bytes, decorators included; identical texts once.

    The files are all `.py` files below the standard library's folder, its tests included, site-packages not, in the
    order of their paths. Test files hold half of the documents: a Python installed without its tests, as Linux
    distributions do it, gives a smaller corpus with another hash.

    Measured on CPython 3.11.7: 1,790 files, 6,115 documents of 4,492,903 bytes. Left out: 3,752 shorter, 2,621
    longer, 96 duplicates, 9 files that are broken on purpose; 4.5 s.

    Args:
        root: the folder to read; the standard library's when None.
    """
    seen: set[str] = set()
    for file, source in _sources(root):
        if source is None:
            yield Skipped(file, "files that do not decode")
            continue
        try:
            found = list(_top_level(source))
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # all that ast.parse documents
            yield Skipped(file, "files that do not parse")
            continue
        for symbol, text in found:
            name, size_bytes = f"{file}:{symbol}", len(text.encode())
            if size_bytes < MIN_BYTES:
                yield Skipped(name, f"shorter than {MIN_BYTES} bytes")
            elif size_bytes > MAX_BYTES:
                yield Skipped(name, f"longer than {MAX_BYTES} bytes")
            elif text in seen:
                yield Skipped(name, "duplicates")
            else:
                seen.add(text)
                yield Found(name, file, text)


def read_stdlib_files(root: Path | None = None) -> Iterator[Found | Skipped]:
    """Every `.py` file of the standard library, whole, in the order of their paths; site-packages left out."""
    for file, source in _sources(root):
        yield Skipped(file, "files that do not decode") if source is None else Found(file, file, source)


def _sources(root: Path | None) -> Iterator[tuple[str, str | None]]:
    """Relative path and text of every file, None where its bytes are not in the encoding it declares."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for file in sorted(paths):
        if NOT_STDLIB.isdisjoint(paths[file].relative_to(root).parts):
            try:
                yield file, decode_source(paths[file].read_bytes())
            except (SyntaxError, UnicodeDecodeError, OSError):
                yield file, None


def _top_level(source: str) -> Iterator[tuple[str, str]]:
    """Name and text of every function and class that stands at the top of a module."""
    body = _parsed(source).body
    lines = source.split("\n")  # not splitlines(): Python itself ends a line at \n only, not at a form feed
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, "\n".join(lines[first - 1 : node.end_lineno]) + "\n"


def _parsed(source: str) -> ast.Module:
    # A tree is many objects and no cycle. The garbage collector would walk the whole heap for each: with torch loaded,
    # reading the library takes 10 s instead of 4.
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            return ast.parse(source)
    finally:
        if collects:
            gc.enable()
