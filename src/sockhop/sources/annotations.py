"""What a Kubernetes Service asks of sockhop in annotations: what its own fields cannot say."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sockhop.model import Algorithm
from sockhop.sources.fields import FieldError, did_you_mean, shown

__all__ = ["Wishes", "read_annotations"]

_PREFIX = "sockhop.io/"
_ALGORITHM, _RESERVE = _PREFIX + "algorithm", _PREFIX + "reserve"
_CHOICES: dict[str, dict[str, Any]] = {
    _ALGORITHM: {str(algorithm): algorithm for algorithm in Algorithm},
    _RESERVE: {"true": True, "false": False},
}


class Wishes(NamedTuple):
    """What annotations ask for; `remarks` say which of them have no effect."""

    algorithm: Algorithm
    reserve: bool
    remarks: tuple[str, ...]


def read_annotations(annotations: Mapping[str, Any]) -> Wishes:
    """Read those of `sockhop.io/`; the others can be anything.

    Raises FieldError, whose path starts at the object. A null is as good as no annotation.
    """
    found: dict[str, Any] = {_ALGORITHM: Algorithm.RANDOM, _RESERVE: False}
    remarks = []
    for key, value in annotations.items():
        if not key.startswith(_PREFIX) or value is None:
            continue
        if key not in _CHOICES:
            known = " and ".join(_CHOICES)
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
    return Wishes(found[_ALGORITHM], found[_RESERVE], tuple(remarks))
