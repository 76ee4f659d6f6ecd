"""What a person does to sockets, on the record."""

import time
from collections.abc import Sequence
from pathlib import Path

from sockhop.agent.events import Event, EventKind, EventLog, events_path
from sockhop.agent.expression import Subject, parse_expression
from sockhop.agent.live_sockets import SocketRow, chosen_sockets, socket_rows
from sockhop.datapath.ending import Action, EngineName, Outcome, choose_engine
from sockhop.errors import InputError

__all__ = ["ActionRow", "sever_by_hand"]

_KINDS = {Action.SEVERED: EventKind.SEVERED, Action.REFUSED: EventKind.REFUSED}


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
    if not text.strip():
        raise InputError("filter: an empty one would mean every socket", hint="state all does")
    subjects = chosen_sockets(pins, parse_expression(text))
    rows = {row.cookie: row for row in socket_rows(subjects)}
    if really:
        with choose_engine(pins, engine) as chosen:
            outcomes = chosen.sever_sockets(each.socket for each in subjects)
        found = _rows(rows, outcomes)
        EventLog(events_path(api)).append(
            _event(row, text) for row in found if row.action in _KINDS
        )
        return found
    return _rows(rows, [_planned(each) for each in subjects])


def _planned(subject: Subject) -> Outcome:
    reason = subject.socket.reason_to_leave
    return Outcome(subject.socket, Action.LEFT if reason else Action.SEVERED, reason)


def _rows(rows: dict[int, SocketRow], outcomes: Sequence[Outcome]) -> list[ActionRow]:
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
