"""Read the tables of a JSON file in pieces, and of each entry only the fields that are used.

A file of COCO's size would fill gigabytes as one document, most of them with polygons that nobody asks for.
"""

from __future__ import annotations

import codecs
import gc
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from coco_example.errors import DataError

__all__ = ["Table", "Tables", "read_tables"]

_PIECE = 1 << 22  # bytes
_SPACE = re.compile(r"[ \t\n\r]*")
_BETWEEN = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")
_scan = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class Table:
    """Entries of one list of a file by columns; None where an entry lacks the field, or is no object."""

    columns: Mapping[str, list[Any]]

    @classmethod
    def of(cls, entries: Sequence[Any], fields: Sequence[str]) -> Table:
        """Take the fields of entries."""
        known = [entry if isinstance(entry, dict) else {} for entry in entries]
        return cls({name: [entry.get(name) for entry in known] for name in fields})


# What a file has under the names of its tables: a table, or what stands there instead of a list.
Tables = dict[str, Any]


class _OddError(Exception):
    """What is read is no JSON, or none that can be told in pieces."""


def read_tables(file: Path, fields: Mapping[str, Sequence[str]], *, progress: bool = False) -> Tables:
    """Read tables of JSON in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Args:
        file: The file.
        fields: The tables to read, and the fields of each.
        progress: Whether to show a bar on a terminal.

    Raises:
        DataError: It cannot be read, or is not JSON.
    """
    try:
        # 1. In pieces.
        with suppress(_OddError), file.open("rb") as opened, _few_collections(), _bar(file, progress) as count:
            return _read_pieces(_Stream(opened, count), fields)
        # 2. At once: either it has a form that pieces do not show, or the parser says what is wrong, and where.
        document = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # a JSONDecodeError names line and column
        raise DataError(
            expected="readable JSON", got=str(error), where=str(file), fix="check the path, or export it again"
        ) from error
    found = {name: document.get(name) for name in fields} if isinstance(document, dict) else {}
    return {name: Table.of(rows, fields[name]) if isinstance(rows, list) else rows for name, rows in found.items()}


def _read_pieces(stream: _Stream, fields: Mapping[str, Sequence[str]]) -> Tables:
    tables: Tables = {}
    stream.expect("{")
    following = "," if stream.next() != "}" else "}"
    while following == ",":
        name = stream.value()
        if not isinstance(name, str):
            raise _OddError
        stream.expect(":")
        if name in fields and stream.next() == "[":
            tables[name] = stream.table(fields[name])
        else:
            value = stream.value()
            if name in fields:
                tables[name] = value
        following = stream.next()
        if following == ",":
            stream.expect(",")
    stream.expect("}")
    if stream.next():
        raise _OddError
    return tables


class _Stream:
    """The text of a file, of which only the part that is being read is in memory."""

    def __init__(self, file: BinaryIO, count: Callable[[int], object]) -> None:
        head = file.read(_PIECE)
        self._file, self._count = file, count
        self._decoder = codecs.getincrementaldecoder(json.detect_encoding(head))("surrogatepass")
        self._text, self._at, self._ended = "", 0, False
        self._add(head)

    def _add(self, piece: bytes) -> None:
        self._count(len(piece))
        self._ended = not piece
        try:
            more = self._decoder.decode(piece, final=self._ended)
        except ValueError as error:
            raise _OddError from error
        self._text, self._at = self._text[self._at :] + more, 0

    def _more(self) -> None:
        """Read on, as much again as is waiting: a value that is as long as the file is not tried at every piece."""
        if self._ended:
            raise _OddError
        self._add(self._file.read(max(_PIECE, len(self._text) - self._at)))

    def next(self) -> str:
        """Return the next character that is no white space; nothing at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def expect(self, character: str) -> None:
        """Pass over a character, and what white space is before it."""
        if self.next() != character:
            raise _OddError
        self._at += 1

    def value(self) -> Any:
        """Read the next value, whatever it is."""
        self.next()
        while True:
            try:
                value, end = _scan(self._text, self._at)
            except (ValueError, RecursionError):  # it may be cut off
                end = len(self._text)
                if self._ended:
                    raise _OddError from None
            if end < len(self._text) or self._ended:  # else a number may go on
                self._at = end
                return value
            self._more()

    def table(self, fields: Sequence[str]) -> Table:
        """Read a list of objects."""
        # 1. None at all.
        columns: dict[str, list[Any]] = {name: [] for name in fields}
        takers = [(name, column.append) for name, column in columns.items()]
        self.expect("[")
        if self.next() == "]":
            self.expect("]")
            return Table(columns)

        # 2. One after the other.
        while True:
            entry = self.value()
            known = entry if type(entry) is dict else {}
            for name, take in takers:
                take(known.get(name))
            found = _BETWEEN.match(self._text, self._at)
            while found is None or (found.end() == len(self._text) and not self._ended):
                self._more()
                found = _BETWEEN.match(self._text, self._at)
            self._at = found.end()
            if found[1] == "]":
                return Table(columns)


@contextmanager
def _few_collections() -> Iterator[None]:
    """Leave reference cycles alone for a while: JSON has none, and the search for them takes longer than parsing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _bar(file: Path, progress: bool) -> Iterator[Callable[[int], object]]:
    """Show a bar from a second on, on a terminal."""
    with tqdm(
        total=file.stat().st_size,
        desc=f"reading {file.name}",
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        delay=1,
        leave=False,
        disable=None if progress else True,  # None: where nobody watches
    ) as bar:
        yield bar.update
