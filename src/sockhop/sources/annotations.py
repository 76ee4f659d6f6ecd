"""What a Kubernetes Service asks of sockhop in annotations: what its own fields cannot say."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

from sockhop.model import Algorithm, IntentRule, Protocol
from sockhop.sources.fields import FieldError, did_you_mean, path_text, shown
from sockhop.sources.intents import read_intent_annotation
from sockhop.sources.splices import SpliceWish, read_splice_annotation

__all__ = ["Wishes", "read_annotations"]

_T = TypeVar("_T")

_PREFIX = "sockhop.io/"
_ALGORITHM, _RESERVE = _PREFIX + "algorithm", _PREFIX + "reserve"
_SPLICE = _PREFIX + "splice"
_CHOICES: dict[str, dict[str, Any]] = {
    _ALGORITHM: {str(algorithm): algorithm for algorithm in Algorithm},
    _RESERVE: {"true": True, "false": False},
}
_INTENTS = {f"{_PREFIX}intent-{protocol.lower()}": protocol for protocol in Protocol}
_KNOWN = (*_CHOICES, _SPLICE, *_INTENTS)


class Wishes(NamedTuple):
    """What annotations ask for; `remarks` say which of them have no effect."""

    algorithm: Algorithm
    reserve: bool
    splice: SpliceWish
    intents: tuple[IntentRule, ...]
    remarks: tuple[str, ...]


def read_annotations(annotations: Mapping[str, Any]) -> Wishes:
    """Read those of `sockhop.io/`; the others can be anything.

    Raises FieldError, whose path starts at the object. A null is as good as no annotation.
    """
    found: dict[str, Any] = {
        _ALGORITHM: Algorithm.RANDOM,
        _RESERVE: False,
        _SPLICE: SpliceWish(),
    }
    intents: list[IntentRule] = []
    remarks = []
    for key, value in annotations.items():
        if not key.startswith(_PREFIX) or value is None:
            continue
        if key in _INTENTS:
            intents += _inside(key, value, partial(read_intent_annotation, _INTENTS[key]))
            continue
        if key == _SPLICE:
            found[key] = _inside(key, value, read_splice_annotation)
            continue
        if key not in _CHOICES:
            known = f"{', '.join(_KNOWN[:-1])} and {_KNOWN[-1]}"
            remarks.append(f"annotation {shown(key)} is ignored: sockhop knows {known}")
            continue
        choices = _CHOICES[key]
        if not isinstance(value, str) or value not in choices:
            raise FieldError(
                shown(value),
                f"one of {', '.join(map(repr, choices))}",
                path=("metadata", "annotations", key),
                hint=did_you_mean(value, choices) if isinstance(value, str) else "",
                quote=isinstance(value, bool),
            )
        found[key] = choices[value]
    return Wishes(
        found[_ALGORITHM], found[_RESERVE], found[_SPLICE], tuple(intents), tuple(remarks)
    )


def _inside(key: str, value: Any, read: Callable[[Any], _T]) -> _T:
    """Read the *value* of the annotation *key*, a string that has fields of its own."""
    try:
        return read(value)
    except FieldError as error:
        # What is inside the string has no line of its own.
        inner = f" at {path_text(error.path)}" if error.path else ""
        path = ("metadata", "annotations", key)
        found = f"{error.found}{inner}"
        raise FieldError(
            found, error.expected, path=path, hint=error.hint, quote=error.quote
        ) from None
