"""What a person does to sockets, on the record."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from sockhop.agent.events import Event, EventKind, EventLog, events_path
from sockhop.agent.expression import Subject, parse_expression
from sockhop.agent.live_sockets import SocketRow, chosen_sockets, socket_rows
from sockhop.datapath.ending import Action, EngineName, Outcome, choose_engine
from sockhop.datapath.resteer import Resteerer
from sockhop.datapath.sockets import Socket
from sockhop.errors import InputError

__all__ = ["ActionRow", "resteer_by_hand", "sever_by_hand"]

_KINDS = {
    Action.SEVERED: EventKind.SEVERED,
    Action.RESTEERED: EventKind.RESTEERED,
    Action.REFUSED: EventKind.REFUSED,
}


class ActionRow(SocketRow):
    """A socket, what was (or would be) done with it, and why not, if it was not."""

    action: Action
    why: str


def sever_by_hand(
    text: str, pins: Path, api: Path, *, engine: EngineName = EngineName.AUTO, really: bool
) -> list[ActionRow]:
    """End the sockets that the expression *text* means; return what became of each.

    Not *really*: return what would. What is done is appended to the events beside *api*.
    """
    subjects = _chosen(text, pins)
    sockets = [each.socket for each in subjects]
    if not really:
        return _rows(subjects, _planned(sockets))
    with choose_engine(pins, engine) as chosen:
        return _recorded(_rows(subjects, chosen.sever_sockets(sockets)), text, api)


def resteer_by_hand(
    text: str, pins: Path, api: Path, *, sever: bool, really: bool
) -> list[ActionRow]:
    """Move the UDP sockets that *text* means to another backend, as :func:`sever_by_hand` ends.

    *sever*: end those that cannot be moved. NotInstalled where nothing is.
    """
    with Resteerer(pins) as resteerer:
        subjects = _chosen(text, pins)
        sockets = [each.socket for each in subjects]
        if not really:
            planned = resteerer.resteer(sockets, _planned if sever else None, dry=True)
            return _rows(subjects, planned)
        with choose_engine(pins) as engine:
            outcomes = resteerer.resteer(sockets, engine.sever_sockets if sever else None)
        return _recorded(_rows(subjects, outcomes), text, api)


def _chosen(text: str, pins: Path) -> list[Subject]:
    if not text.strip():
        raise InputError("filter: an empty one would mean every socket", hint="state all does")
    return chosen_sockets(pins, parse_expression(text))


def _planned(sockets: Sequence[Socket]) -> list[Outcome]:
    return [
        Outcome(each, Action.LEFT if each.reason_to_leave else Action.SEVERED, each.reason_to_leave)
        for each in sockets
    ]


def _recorded(rows: list[ActionRow], text: str, api: Path) -> list[ActionRow]:
    EventLog(events_path(api)).append(_event(row, text) for row in rows if row.action in _KINDS)
    return rows


def _rows(subjects: Sequence[Subject], outcomes: Iterable[Outcome]) -> list[ActionRow]:
    rows = {row.cookie: row for row in socket_rows(subjects)}
    by_cookie = {each.socket.cookie: each for each in outcomes}
    return [
        ActionRow(
            **{field: getattr(row, field) for field in row.__struct_fields__},
            action=by_cookie[cookie].action,
            why=by_cookie[cookie].reason,
        )
        for cookie, row in rows.items()
        if cookie in by_cookie
    ]


def _event(row: ActionRow, text: str) -> Event:
    return Event(
        time=time.time(),
        kind=_KINDS[row.action],
        reason=f"by hand: {text}" + (f"; {row.why}" if row.why else ""),
        service=row.service,
        protocol=row.protocol,
        local=row.local,
        remote=row.remote,
        frontend=row.frontend,
        backend=row.backend,
        cookie=row.cookie,
        netns=row.netns,
        processes=row.processes,
    )
