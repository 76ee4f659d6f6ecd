"""`sockhop audit`."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from sockhop.cli.options import global_options, output_option
from sockhop.cli.output import Column, counted, print_rows, print_value
from sockhop.cli.sockmap_options import (
    chosen_maps,
    given_layout,
    print_pairs,
    sockmap_options,
    stale_entries,
)
from sockhop.errors import InputError

if TYPE_CHECKING:
    from sockhop.diagnose.audit import Audit, AuditedMap, Entry

__all__ = ["STALE_COLUMNS", "command"]

_MAPS = (
    Column("ID", "id"),
    Column("NAME", "name"),
    Column("TYPE", "type", wide=True),
    Column("KEYS", "keys"),
    Column("ENTRIES", "entries"),
    Column("LIVE", "live"),
    Column("STALE-OTHER", "stale_other"),
    Column("STALE-CLOSED", "stale_closed"),
    Column("CHANGING", "changing"),
    Column("UNKNOWN", "unknown"),
    Column("LAYOUT", "layout", wide=True),
)
_ADDRESSES = (
    Column("ADDRESS", "address"),
    Column("ENTRIES", "entries"),
    Column("STALE", "stale"),
)
STALE_COLUMNS = (
    Column("LOCAL", "local"),
    Column("REMOTE", "remote"),
    Column("STATE", "state"),
    Column("HOLDS-LOCAL", "socket_local"),
    Column("HOLDS-REMOTE", "socket_remote"),
    Column("HOLDS-STATE", "socket_state"),
    Column("UNREAD", "unread"),
    Column("COOKIE", "cookie", wide=True),
    Column("NETNS", "netns", wide=True),
    Column("KEY", "key", wide=True),
)
_DUMPED = (Column("LOCAL", "local"), Column("REMOTE", "remote"), Column("KEY", "key", wide=True))
_MOST = 20
"""So many stale entries are listed without -o wide."""


@click.command(epilog="Example: sockhop audit --id 122")
@sockmap_options
@click.option(
    "--dump",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Decode the keys in a text of `bpftool map dump`; needs no root. - is standard input.",
)
@click.option("--list", "listed", is_flag=True, help="List every entry.")
@output_option
@global_options
def command(  # noqa: PLR0913, PLR0917 (click passes them by name)
    every: bool,
    number: int | None,
    pinned: Path | None,
    key: str | None,
    wait: float,
    dump: Path | None,
    listed: bool,
    output: str,
) -> int:
    """Compare every sockmap and sockhash with the sockets that it really holds.

    An entry is stale if its key names another connection than that of the socket it holds, or if
    the socket's connection is over. Where programs insert with BPF_NOEXIST, a new connection with
    the same ends then stays out, and what is sent to it goes to the old socket: it is established,
    and hangs. Also looks at both ends of every local TCP connection: one that splices to one that
    does not know of it. Exit status 1 if something is found.
    """
    if dump is not None:
        if every or number is not None or pinned is not None:
            raise InputError("--dump reads a file: --all, --id and --pinned do not go with it")
        return _print_dump(dump, key, output)
    from sockhop.diagnose.pairs import examine  # noqa: PLC0415 (slow to import)
    from sockhop.diagnose.visit import Visitor  # noqa: PLC0415

    with ExitStack() as stack:
        maps = chosen_maps(stack, every=every, number=number, pinned=pinned, key=key)
        visitor = stack.enter_context(Visitor())
        audits, pairs = examine(visitor, maps, given_layout(key), wait=wait)
        results = [audit.result for audit in audits]
        entries = _entries(audits) if listed else []
        if output in ("json", "yaml"):
            found: dict[str, Any] = {"maps": results, "pairs": pairs}
            print_value(found | ({"entries": entries} if listed else {}), output)
        else:
            _print(results, entries, output)
            print_pairs(pairs, output)
            _conclude(results, pairs.findings)
    return int(any(each.findings for each in results) or pairs.findings > 0)


def _entries(audits: "list[Audit]") -> list[dict[str, Any]]:
    return [
        {"map": audit.result.id} | msgspec.to_builtins(held.described())
        for audit in audits
        for held in audit.look.all()
    ]


def _print(results: "list[AuditedMap]", entries: list[dict[str, Any]], output: str) -> None:
    if not results:
        click.echo("there is no sockmap and no sockhash on this system")
        return
    print_rows(results, _MAPS, output)
    for each in results:
        if each.findings:
            _print_stale(each, output)
        elif each.stale_entries:
            keys = "cookies" if each.keys == "cookie" else "no addresses"
            click.echo(f"note: keys of map {each.id} are {keys}: its stale entries harm nobody")
        if each.keys == "unknown" and each.entries:
            click.echo(
                f"note: how the keys of map {each.id} ({each.name}) are laid out is not known: "
                "--key describes it"
            )
    if entries:
        click.echo()
        for row in entries:
            words = (row["map"], row["state"], row.get("local", ""), row.get("remote", ""))
            click.echo("  ".join(map(str, (*words, row["key"]))))


def _print_stale(audited: "AuditedMap", output: str) -> None:
    click.echo(f"\nstale entries of map {audited.id} ({audited.name}):")
    shown = audited.stale_entries if output == "wide" else audited.stale_entries[:_MOST]
    print_rows(shown, STALE_COLUMNS, output)
    if len(shown) < len(audited.stale_entries):
        click.echo(f"... of {len(audited.stale_entries):,}: -o wide lists all")
    click.echo()
    print_rows([row for row in audited.addresses if row.stale][:_MOST], _ADDRESSES, output)


def _conclude(results: "list[AuditedMap]", harmed: int) -> None:
    stale = sum(each.findings for each in results)
    if stale or harmed:
        click.echo(
            f"\n{stale_entries(stale)} in the way of others, {counted(harmed, 'connection')} "
            "harmed now: `sockhop heal` says what can be done"
        )
    else:
        click.echo("\nno stale entry is in anybody's way, no connection is harmed")


def _print_dump(path: Path, key: str | None, output: str) -> int:
    from sockhop.diagnose.audit import decode_dump  # noqa: PLC0415 (needs the extension)
    from sockhop.diagnose.dumps import parse_dump  # noqa: PLC0415

    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    entries = decode_dump(parse_dump(data.decode(errors="replace"), str(path)), given_layout(key))
    if output in ("json", "yaml"):
        print_value([_dumped(each) for each in entries], output)
        return 0
    print_rows(entries, _DUMPED, output)
    return 0


def _dumped(entry: "Entry") -> dict[str, str]:
    return {"key": entry.key, "local": entry.local, "remote": entry.remote}
