"""Reads the text of `bpftool map dump`, whole or what grep left of it."""

import json
import re
from collections.abc import Iterator
from typing import Any

from sockhop.errors import InputError

__all__ = ["parse_dump"]

_BYTES = re.compile(r"(?:[0-9a-fA-F]{2}\s+)*[0-9a-fA-F]{2}")


def parse_dump(text: str, name: str = "dump") -> list[bytes]:
    """Return the keys in a dump, plain or JSON (-j, -p).

    Lines that grep has left without their `key:` count as parts of a key. InputError, with *name*,
    if there are no keys or they differ in size.
    """
    if text.lstrip()[:1] in ("[", "{"):
        keys = list(_of_json(text, name))
    else:
        keys = [bytes.fromhex(digits) for digits in _of_text(text) if digits]
    if not keys:
        raise InputError(
            f"{name}: there are no keys in it", hint="it should be what `bpftool map dump` prints"
        )
    sizes = sorted({len(key) for key in keys})
    if len(sizes) > 1:
        raise InputError(
            f"{name}: it has keys of {sizes[0]} and of {sizes[-1]} bytes, they should be equal",
            hint="with grep, take whole entries: grep -A 2 key:",
        )
    return keys


def _of_text(text: str) -> Iterator[str]:
    key, in_key = "", True
    for line in text.splitlines():
        parts = re.split(r"\b(key|value):", line)
        for part in parts:
            if part in ("key", "value"):
                yield key
                key, in_key = "", part == "key"
            elif _BYTES.fullmatch(part.strip()):
                key += part.strip() + " " if in_key else ""
            elif part.strip():  # grep's --, bpftool's last line
                yield key
                key, in_key = "", True
    yield key


def _of_json(text: str, name: str) -> Iterator[bytes]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise InputError(f"{name}: it is no JSON: {error}") from None
    for entry in entries if isinstance(entries, list) else [entries]:
        key: Any = entry.get("key") if isinstance(entry, dict) else None
        try:
            yield bytes(int(each, 16) for each in key)
        except (TypeError, ValueError):
            raise InputError(
                f"{name}: an entry has no key of bytes such as ['0x0a', '0x00']",
                hint="it should be what `bpftool -j map dump` prints",
            ) from None
