"""YAML as plain values, built from libyaml's events with bounds on depth and aliases.

PyYAML's composer is left out on purpose: it recurses in C, so that some 100 KB of "- - - -"
take all memory or end the process (PyYAML 6.0.3, libyaml 0.2.5); it also lets the last of two
equal keys win. Values are read as YAML 1.1 says, with PyYAML's own rules, except that times
stay strings.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

__all__ = ["Located", "YamlError", "load_all", "locate"]

DEPTH_MAX = 100
ALIASED_MAX = 1_000_000
"""Most values that the aliases of one document may stand for; merge keys need aliases to grow."""

_SCALAR_MAX = 64
"""A longer plain scalar is a string: no number or boolean needs as much."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CONSTRUCTOR = SafeConstructor()
_TAG = "tag:yaml.org,2002:"
_STRING, _MERGE_TAG = _TAG + "str", _TAG + "merge"
_CONSTRUCTORS = {
    _TAG + "null": _CONSTRUCTOR.construct_yaml_null,
    _TAG + "bool": _CONSTRUCTOR.construct_yaml_bool,
    _TAG + "int": _CONSTRUCTOR.construct_yaml_int,
    _TAG + "float": _CONSTRUCTOR.construct_yaml_float,
}
_RESOLVERS = {
    first: [(tag, rule) for tag, rule in rules if tag in _CONSTRUCTORS or tag == _MERGE_TAG]
    for first, rules in Resolver.yaml_implicit_resolvers.items()
}
_NO_KEY = object()
_MERGE = object()


class YamlError(Exception):
    """Text that is not YAML, or more of it than is good. `line` counts from 1, 0 is unknown."""

    def __init__(self, problem: str, line: int, document: int) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line
        self.document = document


class Located(NamedTuple):
    """Where a value stands; `text` is how it is written, None for a collection."""

    line: int
    text: str | None


class _Refused(Exception):
    """What is wrong with an event."""


def load_all(data: bytes) -> list[Any]:
    """Return the value of each document in *data*, which is UTF-8. Raises YamlError."""
    documents: list[Any] = []
    building = _Building()
    event: Any = None
    try:
        for event in yaml.parse(data, Loader=_LOADER):
            if isinstance(event, yaml.DocumentStartEvent):
                building = _Building()
            elif isinstance(event, yaml.DocumentEndEvent):
                documents.append(building.root)
            else:
                building.take(event)
    except _Refused as error:
        raise YamlError(str(error), _line(event), len(documents) + 1) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "not YAML"
        raise YamlError(problem, mark.line + 1 if mark else 0, len(documents) + 1) from None
    except yaml.reader.ReaderError as error:
        line = data.count(b"\n", 0, error.position) + 1
        raise YamlError(f"{error.reason} ({error.character!r})", line, 1) from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split()), 0, len(documents) + 1) from None
    return documents


def locate(data: bytes, document: int, path: tuple[str | int, ...]) -> Located:
    """Find the value at *path* (keys and indexes) in the document of that number (from 1).

    The line is that of the key, where there is one. A path that leads nowhere gives the last
    place on the way, text that is not YAML gives line 0.
    """
    try:
        events = iter(yaml.parse(data, Loader=_LOADER))
        for event in events:
            document -= isinstance(event, yaml.DocumentStartEvent)
            if document == 0:
                break
        return _descend(events, path)
    except (yaml.YAMLError, StopIteration):
        return Located(0, None)


class _Collection:
    """A list or mapping whose end has not come yet."""

    __slots__ = ("anchor", "count_before", "key", "merged", "value")

    def __init__(self, value: Any, anchor: str | None, count_before: int) -> None:
        self.value = value
        self.anchor = anchor
        self.count_before = count_before
        self.key: Any = _NO_KEY
        self.merged: list[dict[Any, Any]] = []

    def put(self, value: Any) -> None:
        """Take an item, a key or a key's value."""
        if isinstance(self.value, list):
            self.value.append("<<" if value is _MERGE else value)
        elif self.key is _NO_KEY:
            self._put_key(value)
        elif self.key is _MERGE:
            sources = value if isinstance(value, list) else [value]
            if not all(isinstance(source, dict) for source in sources):
                raise _Refused("a merge key (<<) takes a mapping or a list of mappings")
            self.merged, self.key = sources, _NO_KEY
        else:
            self.value[self.key] = "<<" if value is _MERGE else value
            self.key = _NO_KEY

    def _put_key(self, key: Any) -> None:
        if isinstance(key, (list, dict)):
            raise _Refused("a key cannot be a list or a mapping")
        if key in self.value or (key is _MERGE and self.merged):
            raise _Refused(f"duplicate key {_shown_key(key)}")
        self.key = key


class _Building:
    """One document as it is built. Not recursive: depth costs no stack."""

    def __init__(self) -> None:
        self.root: Any = None
        self._open: list[_Collection] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._count = 0
        self._aliased = 0

    def take(self, event: Any) -> None:
        """Take the next event. Raises _Refused."""
        kind = type(event)
        if kind is yaml.ScalarEvent:
            value = _scalar(event)
            self._count += 1
            if event.anchor:
                self._anchors[event.anchor] = ("<<" if value is _MERGE else value, 1)
            self._put(value)
        elif kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
            self._start(event, {} if kind is yaml.MappingStartEvent else [])
        elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
            self._end()
        elif kind is yaml.AliasEvent:
            if event.anchor not in self._anchors:
                raise _Refused(f"unknown or recursive alias *{event.anchor}")
            value, count = self._anchors[event.anchor]
            self._count += count
            self._aliased += count
            if self._aliased > ALIASED_MAX:
                raise _Refused(f"aliases stand for more than {ALIASED_MAX:,} values")
            self._put(value)

    def _start(self, event: Any, value: list[Any] | dict[Any, Any]) -> None:
        own = _TAG + ("map" if isinstance(value, dict) else "seq")
        if event.tag not in (None, "!", own):
            raise _Refused(f"unknown tag {event.tag!r}")
        if len(self._open) >= DEPTH_MAX:
            raise _Refused(f"nested more than {DEPTH_MAX} deep")
        self._count += 1
        self._open.append(_Collection(value, event.anchor, self._count))

    def _end(self) -> None:
        ended = self._open.pop()
        for source in ended.merged:
            for key, value in source.items():
                ended.value.setdefault(key, value)
        if ended.anchor:
            self._anchors[ended.anchor] = (ended.value, self._count - ended.count_before + 1)
        self._put(ended.value)

    def _put(self, value: Any) -> None:
        if self._open:
            self._open[-1].put(value)
        else:
            self.root = "<<" if value is _MERGE else value


def _scalar(event: Any) -> Any:
    text: str = event.value
    tag = event.tag
    if tag is None or tag == "!":
        if not event.implicit[0] or len(text) > _SCALAR_MAX:
            return text
        for implied, rule in _RESOLVERS.get(text[:1], ()):
            if rule.match(text):
                return _MERGE if implied == _MERGE_TAG else _constructed(implied, text)
        return text
    if tag == _STRING:
        return text
    if tag not in _CONSTRUCTORS or len(text) > _SCALAR_MAX:
        raise _Refused(f"unknown tag {tag!r}")
    return _constructed(tag, text)


def _constructed(tag: str, text: str) -> Any:
    try:
        return _CONSTRUCTORS[tag](yaml.ScalarNode(tag, text))
    except (ArithmeticError, LookupError, ValueError):
        raise _Refused(f"{text!r} is not of the type {tag.removeprefix(_TAG)}") from None


def _descend(events: Iterator[Any], path: tuple[str | int, ...]) -> Located:
    event = next(events)
    line = _line(event)
    for step in path:
        if isinstance(event, yaml.MappingStartEvent):
            key = _find_key(events, step)
        elif isinstance(event, yaml.SequenceStartEvent):
            key = _find_item(events, step)
        else:
            return Located(line, None)
        if key is None:
            return Located(line, None)
        line = _line(key)
        event = next(events) if isinstance(step, str) else key
    return Located(line, event.value if isinstance(event, yaml.ScalarEvent) else None)


def _find_key(events: Iterator[Any], key: str | int) -> Any:
    """Return the event of *key*, the value's being the next; None at the mapping's end."""
    for event in events:
        if isinstance(event, yaml.MappingEndEvent):
            return None
        if isinstance(event, yaml.ScalarEvent) and event.value == key:
            return event
        _skip(event, events)
        _skip(next(events), events)
    return None


def _find_item(events: Iterator[Any], index: str | int) -> Any:
    """Return the first event of an item; None at the list's end."""
    for number, event in enumerate(events):
        if isinstance(event, yaml.SequenceEndEvent):
            return None
        if number == index:
            return event
        _skip(event, events)
    return None


def _skip(event: Any, events: Iterator[Any]) -> None:
    """Pass the rest of the value that *event* begins."""
    depth = isinstance(event, yaml.CollectionStartEvent) + 0
    while depth:
        event = next(events)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)


def _shown_key(key: Any) -> str:
    return "<<" if key is _MERGE else repr(key)[:60]


def _line(event: Any) -> int:
    mark = getattr(event, "start_mark", None)
    return mark.line + 1 if mark else 0
