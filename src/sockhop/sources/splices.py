"""Whether a service is spliced, as it says it: in the compact form, in an annotation."""

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from sockhop.model import Splice, SpliceLimits
from sockhop.sources.fields import (
    FieldError,
    Size,
    byte_count,
    did_you_mean,
    mismatch,
    shown,
)
from sockhop.sources.yamlio import YamlError, load_all

__all__ = ["SpliceForm", "SpliceWish", "read_splice", "read_splice_annotation"]

_MODES = [str(choice) for choice in Splice]
_ANNOTATION = (
    f"one of {', '.join(map(repr, _MODES))}, or YAML such as '{{mode: auto, budget: 64KiB}}'"
)
_DEFAULTS = SpliceLimits()

Mode = Annotated[
    Literal["auto", "on", "off"] | bool,
    Meta(description="one of auto, on, off"),
]
"""Unquoted on and off are booleans to YAML 1.1."""


class SpliceFields(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """The mode, and when what is spliced goes back to the stack."""

    mode: Mode
    budget: Size | UnsetType = UNSET
    leave_after: Size | UnsetType = msgspec.field(name="leaveAfter", default=UNSET)


SpliceForm = Annotated[
    Literal["auto", "on", "off"] | bool | SpliceFields,
    Meta(description="one of auto, on, off, {mode: MODE, budget: SIZE, leaveAfter: SIZE}"),
]


class SpliceWish(NamedTuple):
    """What a service asks for; `mode` as :attr:`sockhop.model.Service.splice`."""

    mode: Splice | None = None
    limits: SpliceLimits = _DEFAULTS


def read_splice(form: "str | bool | SpliceFields | UnsetType") -> SpliceWish:
    """Return what *form* asks for."""
    if form is UNSET:
        return SpliceWish()
    if not isinstance(form, SpliceFields):
        return SpliceWish(_mode(form))
    limits = SpliceLimits(
        _DEFAULTS.budget if form.budget is UNSET else byte_count(form.budget),
        _DEFAULTS.leave_after if form.leave_after is UNSET else byte_count(form.leave_after),
    )
    return SpliceWish(_mode(form.mode), limits)


def _mode(written: str | bool) -> Splice:
    if isinstance(written, bool):
        return Splice.ON if written else Splice.OFF
    return Splice(written)


def read_splice_annotation(value: Any) -> SpliceWish:
    """Return what an annotation asks for: a mode, or the fields of the compact form as YAML.

    Raises FieldError, whose path starts at the annotation.
    """
    if isinstance(value, str) and value in _MODES:
        return read_splice(value)
    if not isinstance(value, str):
        raise FieldError(shown(value), _ANNOTATION, quote=isinstance(value, bool))
    try:
        documents = load_all(value.encode(errors="replace"))
    except YamlError as error:
        raise FieldError(f"{shown(value)}, {error.problem}", _ANNOTATION) from None
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise FieldError(shown(value), _ANNOTATION, hint=did_you_mean(value, _MODES))
    try:
        return read_splice(msgspec.convert(documents[0], SpliceFields))
    except msgspec.ValidationError:
        raise mismatch(SpliceFields, documents[0]) from None
