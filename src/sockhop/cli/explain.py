"""`sockhop explain`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from sockhop.cli.events import event_text
from sockhop.cli.options import (
    api_path,
    bpffs_path,
    cgroup_path,
    global_options,
    output_option,
)
from sockhop.cli.output import age, print_value, table
from sockhop.errors import InputError, SockhopError, SystemLackError

if TYPE_CHECKING:
    from sockhop.agent.denied import Denied
    from sockhop.agent.explain import DatagramRow, Explanation, History, Origin

__all__ = ["command"]

_SHOWN = 10


@click.command(epilog="Example: sockhop explain '10.0.0.2:4312>10.96.0.10:80'")
@click.argument("socket")
@output_option
@global_options
def command(socket: str, output: str) -> int:
    """Say which frontend a socket dialled, which backend it has, by which rule and since when.

    SOCKET is PID:FD; or a cookie as `get sockets -o wide` shows it (or in hex, as 0x1f or, from
    `ss -e`, sk:1f); or LOCAL>REMOTE, where REMOTE is the real peer or the frontend and - does for
    >, too; or one of these ends, if it names one socket. /tcp or /udp may follow. Exit
    status 1 if there is no such socket, or if it is not balanced: then the reasons are given.

    Of a socket that sockhop has ended or moved, given its cookie, it says when, why and by which
    change, also when the socket is gone; then the status is 0.

    Where a policy has denied a connect or a datagram (EPERM) it names the policy and its rule. The
    socket may be closed by then: give what was dialled.
    """
    from sockhop.agent.client import ask_agent  # noqa: PLC0415 (slow to import)
    from sockhop.agent.denied import DeniedLately  # noqa: PLC0415
    from sockhop.agent.events import EventLog, events_path  # noqa: PLC0415
    from sockhop.agent.explain import explain, history  # noqa: PLC0415

    agent = ask_agent(api_path())
    cgroup = Path(agent.state.cgroup) if agent else cgroup_path()
    policies = agent.state.policies if agent else []
    log = EventLog(events_path(api_path()))
    try:
        found = explain(socket, bpffs_path(), cgroup, policies)
    except SockhopError as error:
        if past := history(socket, log):
            _print_history(past, output)
            return 0
        if isinstance(error, InputError | SystemLackError):
            raise
        with DeniedLately(bpffs_path(), policies) as lately:
            denied = lately.at(socket)
        if not denied:
            raise
        _print_denied(denied, output)
        return 1
    if not found.remote and found.denied is None:  # others may have been denied to come to it
        with DeniedLately(bpffs_path(), policies) as lately:
            found.denied = next(iter(lately.at(socket)), None)
    past = history(str(found.cookie), log)
    if output in ("json", "yaml"):
        print_value(msgspec.to_builtins(found) | {"events": past.events if past else []}, output)
    else:
        events = [("event", event_text(event)) for event in past.events] if past else []
        click.echo(table([*_lines(found), *events]))
    return int(not found.balanced)


def _print_history(past: "History", output: str) -> None:
    if output in ("json", "yaml"):
        print_value(past, output)
        return
    last = past.events[-1]
    lines = [("socket", f"{last.local} > {last.remote} {last.protocol}, gone")]
    lines += [("event", event_text(event)) for event in past.events]
    click.echo(table([*lines, ("cookie", str(past.cookie))]))


def _print_denied(denied: "list[Denied]", output: str) -> None:
    if output in ("json", "yaml"):
        print_value({"denied": denied}, output)
    else:
        lines = [("denied", _denied_text(each)) for each in denied[:_SHOWN]]
        if more := denied[_SHOWN:]:
            lines.append(("", f"and {len(more):,} earlier"))
        click.echo(table(lines))


def _denied_text(denied: "Denied") -> str:
    return f"{denied.at} ({age(denied.age)} ago), {denied.process}: {denied.reason}"


def _lines(found: "Explanation") -> Iterator[tuple[str, str]]:
    peer = f" > {found.remote}" if found.remote else ""
    yield "socket", f"{found.local}{peer} {found.protocol} {found.state}"
    yield "balanced", "yes" if found.balanced else f"no: {found.reasons[0]}"
    for reason in found.reasons[1:]:
        yield "", f"and {reason}"
    if found.origin:
        yield from _origin_lines(found.origin)
    if found.denied:
        yield "denied", _denied_text(found.denied)
    for row in found.datagrams:
        yield "datagrams", _datagram_text(row)
    yield "getpeername", found.peer_name or "not connected"
    unseen = "not to be seen: an io_uring one, or it needs CAP_SYS_PTRACE"
    yield "processes", ", ".join(found.processes) or (unseen if found.inode else "none")
    yield "cookie", str(found.cookie)
    yield "netns", str(found.netns)
    yield "cgroup", found.cgroup or "unknown"


def _origin_lines(origin: "Origin") -> Iterator[tuple[str, str]]:
    yield "service", _service(origin) or "one that is gone"
    yield "dialled", origin.frontend
    yield "backend", f"{origin.backend}, {origin.backend_state}"
    yield "chosen by", origin.rule
    yield "since", f"{origin.since} ({age(origin.age)} ago)"
    now = f"now {origin.generation_now}" if origin.generation_now else "the frontend is gone"
    yield "generation", f"{origin.generation} ({now})"


def _datagram_text(row: "DatagramRow") -> str:
    latest = "; sent there last" if row.latest else ""
    service = _service(row) or "a service that is gone"
    return f"{row.frontend} of {service} -> {row.backend}, {row.backend_state}{latest}"


def _service(row: "Origin | DatagramRow") -> str:
    return f"{row.service}:{row.port_name}" if row.port_name else row.service
