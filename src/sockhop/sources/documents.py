"""The documents of a manifest file: decoded, and named in errors."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import msgspec

from sockhop.errors import InputError
from sockhop.sources.fields import FieldError, FieldPath, mismatch, path_text
from sockhop.sources.paths import printable, read_bytes
from sockhop.sources.yamlio import Located, YamlError, load_all, locate

__all__ = ["Document", "Place", "read_documents"]

_NOTHING_HINT = 'to ask for no services at all, write "version: 1" and "services: []"'
_BOM = b"\xef\xbb\xbf"

_DECODERS: dict[Any, Any] = {}
"""By type; to make one costs as much as to decode a small document."""

T = TypeVar("T")


class _Items(msgspec.Struct):
    items: list[Any]


class _RawItems(msgspec.Struct):
    items: list[msgspec.Raw]


class Place(NamedTuple):
    """Where a document stands, or one item of a `List` in it.

    `number` counts from 1, 0 if the file has only one; `prefix` is the item's place. It keeps
    nothing of the file: to name a line it reads that again.
    """

    path: str
    number: int
    prefix: FieldPath = ()

    @property
    def file(self) -> str:
        """The file's path as it can be printed."""
        return printable(self.path)

    def title(self, path: FieldPath = (), data: bytes | None = None) -> str:
        """Return `FILE:LINE: document N: FIELD` of the value at *path*, in *data* if it is given.

        Without the line if the file cannot be read any more.
        """
        return self._title(self._locate(path, data).line, path)

    def error(self, error: FieldError, data: bytes | None = None) -> InputError:
        """Return what tells a user of *error*, whose path starts at this document."""
        where = self._locate(error.path, data)
        hint = error.hint
        if error.quote and where.text is not None:
            hint = f'quote it: "{where.text}"'
        return InputError(f"{self._title(where.line, error.path)}: {error}", hint=hint)

    def _title(self, line: int, path: FieldPath) -> str:
        start = _start(self.path, line, self.number)
        return ": ".join(filter(None, (start, path_text((*self.prefix, *path)))))

    def _locate(self, path: FieldPath, data: bytes | None) -> Located:
        if data is None:
            try:
                data = read_bytes(self.path).removeprefix(_BOM)
            except InputError:
                return Located(0, None)
        # JSON is YAML, nearly always.
        return locate(data, max(self.number, 1), (*self.prefix, *path))


class Document:
    """One document of a file, or one item of a `List` in it."""

    __slots__ = ("_content", "_data", "_is_json", "place")

    def __init__(self, place: Place, data: bytes, content: Any, *, is_json: bool) -> None:
        """*data*: the whole file; *content*: JSON text, or for YAML the value."""
        self.place = place
        self._data = data
        self._content = content
        self._is_json = is_json

    def decode(self, kind: type[T]) -> T:
        """Return the document as *kind*. Raises InputError."""
        try:
            if self._is_json:
                return _decoder(kind).decode(self._content)
            return msgspec.convert(self._content, kind)
        except msgspec.ValidationError:
            raise self.error(mismatch(kind, self._value())) from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise _json_error(self.place.path, self._data, error) from None

    def items(self) -> Iterator["Document"]:
        """Return the items of a `List` as documents. Raises InputError, also for none."""
        items: list[Any]
        if self._is_json:
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
            place = self.place._replace(prefix=(*self.place.prefix, "items", index))
            yield Document(place, self._data, item, is_json=self._is_json)

    def error(self, error: FieldError) -> InputError:
        """Return what tells a user of *error*, whose path starts at this document."""
        return self.place.error(error, self._data)

    def _value(self) -> Any:
        if not self._is_json:
            return self._content
        try:
            return msgspec.json.decode(self._content)
        except (msgspec.DecodeError, RecursionError) as error:
            raise _json_error(self.place.path, self._data, error) from None


def read_documents(path: str) -> list[Document]:
    """Read the documents of a file.

    Raises InputError if it cannot be read, is not UTF-8, is no YAML or JSON, is larger than
    FILE_MAX, or holds no document.
    """
    data = read_bytes(path).removeprefix(_BOM)
    _check_encoding(path, data)
    is_json = _is_json(path, data)
    contents = _json_contents(data) if is_json else _yaml_contents(path, data)
    several = len(contents) > 1
    documents = [
        Document(Place(path, number if several else 0), data, content, is_json=is_json)
        for number, content in enumerate(contents, 1)
        if content is not None
    ]
    if not documents:
        raise InputError(
            f"{printable(path)}: found no document, expected services", hint=_NOTHING_HINT
        )
    return documents


def _check_encoding(path: str, data: bytes) -> None:
    if data.isascii():  # needs no copy
        return
    try:
        data.decode()
    except UnicodeDecodeError as error:
        start = _start(path, data.count(b"\n", 0, error.start) + 1, 0)
        found = f"found the byte {data[error.start]:#04x}"
        raise InputError(f"{start}: {found}, expected UTF-8 text") from None


def _json_contents(data: bytes) -> list[Any]:
    return [] if data.strip() in (b"", b"null") else [data]


def _yaml_contents(path: str, data: bytes) -> list[Any]:
    try:
        return load_all(data)
    except YamlError as error:
        start = _start(path, error.line, error.document if error.document > 1 else 0)
        raise InputError(f"{start}: {error.problem}") from None


def _is_json(path: str, data: bytes) -> bool:
    """By name; what comes without one by its first character."""
    if path.endswith((".yaml", ".yml", ".json")):
        return path.endswith(".json")
    return data.lstrip()[:1] == b"{"


def _decoder(kind: type[T]) -> "msgspec.json.Decoder[T]":
    if kind not in _DECODERS:
        _DECODERS[kind] = msgspec.json.Decoder(kind)
    decoder: msgspec.json.Decoder[T] = _DECODERS[kind]
    return decoder


def _json_error(path: str, data: bytes, error: Exception) -> InputError:
    """Name the line of a fault in JSON's syntax: the standard library knows it."""
    line, problem = 0, str(error)
    try:
        json.loads(data, parse_int=float)
    except json.JSONDecodeError as found:
        line, problem = found.lineno, found.msg
    except RecursionError:
        problem = "nested too deep"
    return InputError(f"{_start(path, line, 0)}: not JSON: {problem}")


def _start(path: str, line: int, document: int) -> str:
    text = f"{printable(path)}:{line}" if line else printable(path)
    return f"{text}: document {document}" if document else text
