"""What is wrong with a value: where it is, what was found, what was expected.

msgspec finds that something is wrong, and fast; :func:`mismatch` then says what, slowly.
"""

import types
from collections.abc import Iterable, Iterator
from datetime import datetime
from difflib import get_close_matches
from enum import Enum
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import msgspec
from msgspec import structs

from sockhop.model import parse_address

__all__ = [
    "Duration",
    "FieldError",
    "FieldPath",
    "Size",
    "byte_count",
    "did_you_mean",
    "milliseconds",
    "mismatch",
    "parse_host",
    "path_text",
    "shown",
]

FieldPath = tuple[str | int, ...]
"""Keys and indexes that lead to a value."""

Duration = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[1-9][0-9]{0,8}(ms|s|m|h|d)\Z",
        description='a duration such as "500ms", "30s", "5m", "3h" or "1d"',
    ),
]

Size = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^([1-9][0-9]{0,3}KiB|[1-9][0-9]?MiB)\Z",
        description='a size from "1KiB" to "99MiB", such as "256KiB"',
    ),
]

_SHOWN_MAX = 60
_MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_NAMES: dict[Any, str] = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    datetime: 'a time such as "2024-01-31T12:00:00Z"',
}


class FieldError(Exception):
    """A value that its field cannot take.

    `found` and `expected` are what its text is made of; `path` leads to it from wherever the error
    is caught; `quote`: it would do as a string.
    """

    def __init__(
        self,
        found: str,
        expected: str,
        *,
        path: FieldPath = (),
        hint: str = "",
        quote: bool = False,
    ) -> None:
        super().__init__(f"found {found}, expected {expected}")
        self.found = found
        self.expected = expected
        self.path = path
        self.hint = hint
        self.quote = quote

    def under(self, *steps: str | int) -> Self:
        """Put *steps* before the path; returns the error itself, to be raised again."""
        self.path = (*steps, *self.path)
        return self


def path_text(path: FieldPath) -> str:
    """Return a path as people write it: `services[0].name`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif step.isidentifier():
            text += f".{step}" if text else step
        else:
            text += f"[{shown(step)}]"
    return text


def shown(value: object) -> str:
    """Return a value for a message: short, one line, as JSON names things."""
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge number"
    text = repr(value[: _SHOWN_MAX + 1]) if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}…"


def parse_host(text: str) -> str:
    """Return the canonical text of an address that a socket can have, "" for anything else."""
    try:
        address = parse_address(text)
    except ValueError:
        return ""
    return "" if address in ("0.0.0.0", "::") else address


def milliseconds(duration: str) -> int:
    """Return a :data:`Duration` as a number of milliseconds."""
    digits = duration.rstrip("mshd")
    return int(digits) * _MILLISECONDS[duration[len(digits) :]]


def byte_count(size: str) -> int:
    """Return a :data:`Size` as a number of bytes."""
    return int(size[:-3]) << (10 if size.endswith("KiB") else 20)


def mismatch(kind: Any, value: object) -> FieldError:
    """Say why msgspec cannot convert *value* to the type *kind*."""
    members = list(_members(kind))
    for member in members:
        if isinstance(value, dict) and _is_struct(member):
            return _struct_mismatch(member, value)
        if isinstance(value, list) and get_origin(member) is list:
            (item_kind,) = get_args(member)
            for index, item in enumerate(value):
                if not _fits(item_kind, item):
                    return mismatch(item_kind, item).under(index)
        if isinstance(value, dict) and get_origin(member) is dict:
            return _key_mismatch(value)
    choices = [choice for member in members for choice in _choices(member)]
    return FieldError(
        shown(value),
        _expected(kind),
        hint=did_you_mean(value, choices)
        if isinstance(value, str) and value not in choices
        else "",
        quote=isinstance(value, (bool, int, float)) and _fits(kind, shown(value)),
    )


def _struct_mismatch(kind: Any, value: dict[Any, Any]) -> FieldError:
    fields = structs.fields(kind)
    names = [field.encode_name for field in fields]
    for key in value:
        if not isinstance(key, str):
            return _key_mismatch(value)
        if key not in names and kind.__struct_config__.forbid_unknown_fields:
            return FieldError(
                f"unknown key {shown(key)}",
                f"one of {', '.join(names)}",
                path=(key,),
                hint=did_you_mean(key, names),
            )
    for field in fields:
        if field.encode_name in value:
            item = value[field.encode_name]
            if not _fits(field.type, item):
                return mismatch(field.type, item).under(field.encode_name)
        elif field.required:
            return FieldError("nothing", _expected(field.type), path=(field.encode_name,))
    return FieldError(shown(value), "a mapping")


def _key_mismatch(value: dict[Any, Any]) -> FieldError:
    key = next(key for key in value if not isinstance(key, str))
    return FieldError(f"the key {shown(key)}", "a string", hint="keys too need quotes")


def did_you_mean(found: object, known: Iterable[str]) -> str:
    """Return a hint that names the nearest of *known*, or nothing."""
    near = get_close_matches(str(found)[:_SHOWN_MAX], list(known), 1)
    return f"did you mean {shown(near[0])}?" if near else ""


def _fits(kind: Any, value: object) -> bool:
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError):
        return False
    return True


def _members(kind: Any) -> Iterator[Any]:
    """Each type that *kind* is a union of, without annotations."""
    if get_origin(kind) is Annotated:
        yield from _members(get_args(kind)[0])
    elif get_origin(kind) in (Union, types.UnionType):
        for member in get_args(kind):
            yield from _members(member)
    else:
        yield kind


def _expected(kind: Any) -> str:
    """The Meta's description, or what the types are called."""
    if get_origin(kind) is Annotated:
        _, *annotations = get_args(kind)
        for meta in annotations:
            if isinstance(meta, msgspec.Meta) and meta.description:
                return meta.description
        return _expected(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        parts = (
            member for member in get_args(kind) if member not in (types.NoneType, msgspec.UnsetType)
        )
        return " or ".join(_expected(member) for member in parts)
    if choices := _choices(kind):
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if _is_struct(kind):
        return "a mapping"
    return "a list" if get_origin(kind) is list else _NAMES.get(kind, "something else")


def _choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(choice.value) for choice in kind]
    return []


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
