"""`sockhop explain`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sockhop.cli.options import (
    api_path,
    bpffs_path,
    cgroup_path,
    global_options,
    output_option,
)
from sockhop.cli.output import age, print_value, table

if TYPE_CHECKING:
    from sockhop.agent.explain import DatagramRow, Explanation, Origin

__all__ = ["command"]


@click.command(epilog="Example: sockhop explain '10.0.0.2:4312>10.96.0.10:80'")
@click.argument("socket")
@output_option
@global_options
def command(socket: str, output: str) -> int:
    """Say which frontend a socket dialled, which backend it has, by which rule and since when.

    SOCKET is PID:FD; or a cookie as `get sockets -o wide` shows it (or in hex, as 0x1f or, from
    `ss -e`, sk:1f); or LOCAL>REMOTE, also written LOCAL-REMOTE, where REMOTE is the real peer or
    the frontend; or one of these ends, if it names one socket. /tcp or /udp may follow. Exit
    status 1 if there is no such socket, or if it is not balanced: then the reasons are given.
    """
    from sockhop.agent.client import ask_agent  # noqa: PLC0415 (slow to import)
    from sockhop.agent.explain import explain  # noqa: PLC0415

    agent = ask_agent(api_path())
    cgroup = Path(agent.state.cgroup) if agent else cgroup_path()
    found = explain(socket, bpffs_path(), cgroup)
    if output in ("json", "yaml"):
        print_value(found, output)
    else:
        click.echo(table(list(_lines(found))))
    return int(not found.balanced)


def _lines(found: "Explanation") -> Iterator[tuple[str, str]]:
    peer = f" > {found.remote}" if found.remote else ""
    yield "socket", f"{found.local}{peer} {found.protocol} {found.state}"
    yield "balanced", "yes" if found.balanced else f"no: {found.reasons[0]}"
    for reason in found.reasons[1:]:
        yield "", f"and {reason}"
    if found.origin:
        yield from _origin_lines(found.origin)
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
