"""The documents of manifest files: found, read, decoded, and named in errors."""

import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from sockhop.errors import InputError
from sockhop.sources.fields import FieldError, FieldPath, mismatch, path_text
from sockhop.sources.yamlio import Located, YamlError, load_all, locate

__all__ = ["Document", "is_manifest_name", "read_documents"]

FILE_MAX = 256 * 2**20
"""Largest file, in bytes."""

_JSON = ".json"
_SUFFIXES = (".yaml", ".yml", _JSON)
_NOTHING_HINT = 'to ask for no services at all, write "version: 1" and "services: []"'
_BOM = b"\xef\xbb\xbf"

_DECODERS: dict[Any, Any] = {}
"""By type; to make one costs as much as to decode a small document."""

T = TypeVar("T")


class _File(NamedTuple):
    """A file as read; `title` is its path as it can be printed."""

    title: str
    data: bytes
    is_json: bool
    documents: int


class _Items(msgspec.Struct):
    items: list[Any]


class _RawItems(msgspec.Struct):
    items: list[msgspec.Raw]


class Document:
    """One document of a file, or one item of a `List` in it.

    `file` is the path as it can be printed.
    """

    __slots__ = ("_content", "_file", "_number", "_prefix")

    def __init__(self, file: _File, number: int, content: Any, prefix: FieldPath = ()) -> None:
        """*content*: JSON text, or for YAML the value; *prefix*: the item's place."""
        self._file = file
        self._number = number
        self._content = content
        self._prefix = prefix

    @property
    def file(self) -> str:
        return self._file.title

    def decode(self, kind: type[T]) -> T:
        """Return the document as *kind*. Raises InputError."""
        try:
            if self._file.is_json:
                return _decoder(kind).decode(self._content)
            return msgspec.convert(self._content, kind)
        except msgspec.ValidationError:
            raise self.error(mismatch(kind, self._value())) from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise _json_error(self._file, error) from None

    def items(self) -> Iterator["Document"]:
        """Return the items of a `List` as documents. Raises InputError, also for none."""
        items: list[Any]
        if self._file.is_json:
            try:
                items = list(_decoder(_RawItems).decode(self._content).items)
            except (msgspec.DecodeError, RecursionError):
                items = self.decode(_Items).items
        else:
            items = self.decode(_Items).items
        if not items:
            error = FieldError("an empty list", "objects", path=("items",), hint=_NOTHING_HINT)
            raise self.error(error)
        for index, item in enumerate(items):
            yield Document(self._file, self._number, item, (*self._prefix, "items", index))

    def error(self, error: FieldError) -> InputError:
        """Return what tells a user of *error*, whose path starts at this document."""
        where = self._locate(error.path)
        hint = error.hint
        if error.quote and where.text is not None:
            hint = f'quote it: "{where.text}"'
        return InputError(f"{self._title(where.line, error.path)}: {error}", hint=hint)

    def place(self, path: FieldPath = ()) -> str:
        """Return `FILE:LINE: document N: FIELD` of the value at *path*."""
        return self._title(self._locate(path).line, path)

    def _title(self, line: int, path: FieldPath) -> str:
        number = self._number if self._file.documents > 1 else 0
        parts = (_place(self._file.title, line, number), path_text((*self._prefix, *path)))
        return ": ".join(filter(None, parts))

    def _locate(self, path: FieldPath) -> Located:
        # JSON is YAML, nearly always.
        return locate(self._file.data, self._number, (*self._prefix, *path))

    def _value(self) -> Any:
        if not self._file.is_json:
            return self._content
        try:
            return msgspec.json.decode(self._content)
        except (msgspec.DecodeError, RecursionError) as error:
            raise _json_error(self._file, error) from None


def read_documents(paths: Sequence[Path]) -> Iterator[Document]:
    """Read the documents of files and directories, in order; a directory's files by name.

    Raises InputError for a path that cannot be read, a directory without manifests, a file that
    is not UTF-8, is no YAML or JSON, is larger than FILE_MAX, or holds no document.
    """
    for path in paths:
        for file in _files(path):
            yield from _read(file)


def is_manifest_name(name: str) -> bool:
    """Whether a directory's file of this name is read."""
    return name.endswith(_SUFFIXES) and not name.startswith(".")


def _files(path: Path) -> list[Path]:
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return [path]
        files = [
            entry
            for entry in sorted(path.iterdir())
            if is_manifest_name(entry.name) and not entry.is_dir()
        ]
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not files:
        raise InputError(
            f"{_printable(path)}: found no manifest in the directory, "
            "expected files named *.yaml, *.yml or *.json"
        )
    return files


def _read(path: Path) -> list[Document]:
    title = _printable(path)
    data = _read_bytes(path).removeprefix(_BOM)
    _check_encoding(title, data)
    is_json = _is_json(path, data)
    contents = _json_contents(data) if is_json else _yaml_contents(title, data)
    file = _File(title, data, is_json, len(contents))
    documents = [
        Document(file, number, content)
        for number, content in enumerate(contents, 1)
        if content is not None
    ]
    if not documents:
        raise InputError(
            f"{title}: found no document, expected services",
            hint=_NOTHING_HINT,
        )
    return documents


def _check_encoding(title: str, data: bytes) -> None:
    if data.isascii():  # needs no copy
        return
    try:
        data.decode()
    except UnicodeDecodeError as error:
        place = _place(title, data.count(b"\n", 0, error.start) + 1, 0)
        found = f"found the byte {data[error.start]:#04x}"
        raise InputError(f"{place}: {found}, expected UTF-8 text") from None


def _json_contents(data: bytes) -> list[Any]:
    return [] if data.strip() in (b"", b"null") else [data]


def _yaml_contents(title: str, data: bytes) -> list[Any]:
    try:
        return load_all(data)
    except YamlError as error:
        place = _place(title, error.line, error.document if error.document > 1 else 0)
        raise InputError(f"{place}: {error.problem}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_MAX + 1)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if len(data) > FILE_MAX:
        raise InputError(
            f"{_printable(path)}: found more than {FILE_MAX >> 20} MiB, expected a smaller file"
        )
    return data


def _is_json(path: Path, data: bytes) -> bool:
    """By name; what comes without one (a pipe, say) by its first character."""
    if path.suffix in _SUFFIXES:
        return path.suffix == _JSON
    return data.lstrip()[:1] == b"{"


def _decoder(kind: type[T]) -> "msgspec.json.Decoder[T]":
    if kind not in _DECODERS:
        _DECODERS[kind] = msgspec.json.Decoder(kind)
    decoder: msgspec.json.Decoder[T] = _DECODERS[kind]
    return decoder


def _json_error(file: _File, error: Exception) -> InputError:
    """Name the line of a fault in JSON's syntax: the standard library knows it."""
    line, problem = 0, str(error)
    try:
        json.loads(file.data, parse_int=float)
    except json.JSONDecodeError as found:
        line, problem = found.lineno, found.msg
    except RecursionError:
        problem = "nested too deep"
    return InputError(f"{_place(file.title, line, 0)}: not JSON: {problem}")


def _unreadable(path: Path, error: OSError | ValueError) -> InputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InputError(f"{_printable(path)}: cannot be read: {reason}")


def _place(title: str, line: int, document: int) -> str:
    text = f"{title}:{line}" if line else title
    return f"{text}: document {document}" if document else text


def _printable(path: Path) -> str:
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)
