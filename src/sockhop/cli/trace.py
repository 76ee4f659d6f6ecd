"""`sockhop trace path`."""

from typing import TYPE_CHECKING

import click

from sockhop.cli.options import bpffs_path, global_options, output_option, parse_duration
from sockhop.cli.output import counted, print_value
from sockhop.cli.target import dial_options, namespace_at, parse_question
from sockhop.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sockhop.diagnose.callpaths import Difference, Moment, Step
    from sockhop.diagnose.dial import Question
    from sockhop.diagnose.trace import Trace, Traced

__all__ = ["command"]

_MARKS = {"-": "answered only", "+": "not answered only"}


@click.group("trace")
@global_options
def command() -> None:
    """Record what the kernel does for some connections."""


@command.command(
    "path",
    short_help="Compare an answered request with one that was not.",
    epilog="Example: sockhop trace path 10.0.1.7:8080 --http /health",
)
@click.argument("target", metavar="ADDRESS:PORT")
@click.option(
    "--pid", type=click.IntRange(1), metavar="PID", help="Only connections of this process."
)
@click.option("--comm", metavar="NAME", help="Only connections of programs of this name.")
@dial_options(
    http="Make connections that ask for this path, and trace those.",
    origin="Make them from",
    counted="How many connections --http makes from each place.",
    count=10,
    timeout="How long an answer to --http may take.",
)
@click.option(
    "--for",
    "seconds",
    default="10s",
    show_default=True,
    metavar="DURATION",
    callback=parse_duration,
    help="Trace so long at the most.",
)
@click.option(
    "--records",
    "most",
    type=click.IntRange(1, 200_000),
    metavar="N",
    default=20_000,
    show_default=True,
    help="Keep so many records at the most, of about 350 bytes.",
)
@output_option
@global_options
def path(  # noqa: PLR0913, PLR0917 (click passes them by name)
    target: str,
    pid: int | None,
    comm: str | None,
    http: str | None,
    origins: tuple[str, ...],
    count: int,
    timeout: float,
    seconds: float,
    most: int,
    output: str,
) -> int:
    """Compare the kernel functions of an answered and an unanswered request.

    Records which functions of the kernel's socket layer run for the TCP connections of an address,
    who calls them, and what becomes of each socket's handlers (sk_prot). Then it takes a connection
    whose request was answered and one whose was not, and says where their call paths first differ.
    On kernels without kprobes it sees less, and says so. Exit status 1 if a request got no answer.
    """
    from sockhop.diagnose.trace import Program, trace  # noqa: PLC0415 (slow to import)

    question = parse_question(target, http, count, timeout)
    if origins and http is None:
        raise InputError("--from says where --http makes connections: give --http, too")
    found = trace(
        (question.address, question.port),
        seconds=seconds,
        most=most,
        dial=None if http is None else _dialler(question, origins),
        begun=lambda: click.echo(f"tracing {question.name}; Ctrl-C ends it", err=True),
        of=Program(pid, comm),
    )
    if output in ("json", "yaml"):
        print_value(found, output)
    else:
        _print(found, wide=output == "wide")
        if not found.verdicts:
            _say_where(question)
    return int(found.unanswered is not None)


def _dialler(question: "Question", origins: tuple[str, ...]) -> "Callable[[], None]":
    from sockhop.diagnose.dial import dialled  # noqa: PLC0415 (slow to import)

    places = [namespace_at(each) if each else None for each in origins or ("",)]

    def dial() -> None:
        for place in places:
            with dialled(place, question):
                pass

    return dial


def _say_where(question: "Question") -> None:
    """Tell of the backends if there can be no connection to the address itself."""
    from sockhop.diagnose.frontends import Address, Frontends, named  # noqa: PLC0415 (slow)
    from sockhop.kernel.netns import current_cookie  # noqa: PLC0415

    with Frontends(bpffs_path()) as frontends:
        frontend = frontends.at(Address(question.address, question.port), current_cookie())
    if frontend is not None:
        names = ", ".join(named(Address(each.address, each.port)) for each in frontend.backends)
        click.echo(
            f"note: {question.name} is a frontend: connections that are balanced go to its "
            f"backends, {names or 'of which there is none'}; trace one of those"
        )


def _print(found: "Trace", *, wide: bool) -> None:
    what = "tracepoint" if found.reason else "kernel function"
    click.echo(
        f"{counted(len(found.functions), what)} traced for {found.seconds:.1f} s: "
        f"{counted(found.records, 'record')}"
    )
    if found.reason:
        click.echo(
            f"note: functions cannot be traced here: {found.reason}. Tracepoints tell less: "
            "which handlers a socket has when a call ends, not what was called"
        )
    if found.lost:
        click.echo(f"note: {counted(found.lost, 'record')} found no room: trace less at a time")
    if found.truncated:
        click.echo("note: ended early, with as many records as --records allows")
    counts = ", ".join(f"{number} {verdict}" for verdict, number in found.verdicts.items())
    click.echo(f"connections: {counts or 'none'}")
    for each in (found.answered, found.unanswered):
        if each:
            _print_connection(each)
    if found.difference:
        click.echo(f"\nfirst difference, at the {found.difference.side}'s end:")
        _print_difference(found.difference)
    elif found.answered and found.unanswered:
        click.echo("\nno difference: the same functions were called for both, at both ends")
    _print_paths(found)
    for each in (found.answered, found.unanswered):
        if each:
            _print_life(each, wide=wide)


def _print_connection(of: "Traced") -> None:
    names = "; ".join(f"{side}: {', '.join(who) or '-'}" for side, who in of.processes.items())
    click.echo(f"  {of.verdict}: {of.connection} ({names})")


def _print_difference(found: "Difference") -> None:
    if not found.called:
        click.echo("  recv() would call")
    elif found.path:
        click.echo(f"  {_named(found.path[-1])} calls")
    else:
        click.echo("  the system call calls")
    rows = [("answered:", found.good), ("not answered:", found.bad)]
    for title, steps in rows:
        click.echo(f"    {title:<14}{', '.join(map(_named, steps)) or 'nothing there'}")


def _named(step: "Step") -> str:
    return f"{step.function} ({step.file})" if step.file else step.function


def _print_paths(found: "Trace") -> None:
    both = found.answered and found.unanswered
    for side, lines in found.paths.items():
        click.echo(f"\ncalls for the {side}'s socket" + (", - " if both else ":"), nl=False)
        click.echo("for the answered one only, + for the other only:" if both else "")
        for line in lines:
            mark = line.mark if both else " "
            name = f"{mark} {'  ' * line.depth}{line.step.function}"
            click.echo(f"  {name:<44}{line.step.file}".rstrip())


def _print_life(of: "Traced", *, wide: bool) -> None:
    for side, moments in of.life.items():
        click.echo(f"\nhandlers of the {side}'s socket, {of.verdict}:")
        for each in moments:
            click.echo(f"  {1000 * each.seconds:10.3f} ms  {each.event:<26}{each.receiver}")
            if wide or _is_telling(each):
                click.echo(f"{'':17}by {' < '.join(each.callers)}")


def _is_telling(moment: "Moment") -> bool:
    return moment.event == "sk_psock_drop"
