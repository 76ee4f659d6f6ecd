"""What should become of live sockets, as services say it: in the compact form, in annotations."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from sockhop.model import Intent, IntentKind, IntentRule, Protocol, Trigger
from sockhop.sources.fields import Duration, FieldError, milliseconds, mismatch, shown
from sockhop.sources.yamlio import YamlError, load_all

__all__ = ["IntentForm", "read_intent_annotation", "read_intents"]

_ANNOTATION = "YAML such as 'removed: {drain: 30s}'"


class Drain(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """After `drain` end what makes no progress, after `deadline` all that is left."""

    drain: Duration
    deadline: Duration | UnsetType = UNSET


Action = Annotated[
    Literal["leave", "sever", "resteer"] | Drain,
    Meta(description="one of leave, sever, resteer, {drain: DURATION, deadline: DURATION}"),
]


class Triggers(Struct, frozen=True, forbid_unknown_fields=True):
    """What should happen to live sockets when a backend or a permission goes."""

    removed: Action | UnsetType = UNSET
    terminating: Action | UnsetType = UNSET
    quarantined: Action | UnsetType = UNSET
    maintenance: Action | UnsetType = UNSET
    denied: Action | UnsetType = UNSET


class IntentForm(Struct, frozen=True, forbid_unknown_fields=True):
    """Triggers by protocol."""

    tcp: Triggers | UnsetType = UNSET
    udp: Triggers | UnsetType = UNSET


def read_intents(form: IntentForm) -> tuple[IntentRule, ...]:
    """Return the rules that *form* states. Raises FieldError, whose path starts at the service."""
    rules: list[IntentRule] = []
    for protocol in Protocol:
        triggers = getattr(form, protocol.lower())
        if triggers is not UNSET:
            try:
                rules += _rules(protocol, triggers)
            except FieldError as error:
                raise error.under("intent", protocol.lower()) from None
    return tuple(rules)


def read_intent_annotation(protocol: Protocol, value: Any) -> tuple[IntentRule, ...]:
    """Return the rules of an annotation: the triggers of *protocol* as YAML in a string.

    Raises FieldError, whose path starts at the annotation.
    """
    if not isinstance(value, str):
        raise FieldError(shown(value), f"a string with {_ANNOTATION}")
    try:
        documents = load_all(value.encode(errors="replace"))
    except YamlError as error:
        raise FieldError(f"{shown(value)}, {error.problem}", _ANNOTATION) from None
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise FieldError(shown(value), _ANNOTATION)
    try:
        triggers = msgspec.convert(documents[0], Triggers)
    except msgspec.ValidationError:
        raise mismatch(Triggers, documents[0]) from None
    return tuple(_rules(protocol, triggers))


def _rules(protocol: Protocol, triggers: Triggers) -> Iterator[IntentRule]:
    for trigger in Trigger:
        action = getattr(triggers, trigger)
        if action is not UNSET:
            try:
                yield IntentRule(protocol, trigger, _intent(action))
            except FieldError as error:
                raise error.under(trigger) from None


def _intent(action: str | Drain) -> Intent:
    if isinstance(action, str):
        return Intent(IntentKind(action))
    after = milliseconds(action.drain)
    if action.deadline is UNSET:
        return Intent(IntentKind.DRAIN, after / 1000)
    deadline = milliseconds(action.deadline)
    if deadline < after:
        expected = f"no less than the time to drain, {action.drain}"
        raise FieldError(shown(action.deadline), expected, path=("deadline",))
    return Intent(IntentKind.DRAIN, after / 1000, deadline / 1000)
