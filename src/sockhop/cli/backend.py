"""`sockhop backend quarantine|maintenance|activate`."""

from typing import TYPE_CHECKING

import click

from sockhop.cli.options import api_path, global_options, output_option, parse_duration
from sockhop.cli.output import age, print_value
from sockhop.errors import SystemLackError
from sockhop.model import BackendState, endpoint, parse_address

if TYPE_CHECKING:
    from sockhop.agent.state import Override

__all__ = ["command", "override_text"]

_STATES = {
    "quarantine": BackendState.QUARANTINED,
    "maintenance": BackendState.MAINTENANCE,
    "activate": BackendState.ACTIVE,
}


def _parse_backend(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    try:
        number = int(port) if port.isdecimal() else 0
        if not 1 <= number <= 65535:
            raise ValueError(f"{port!r} is no port from 1 to 65535")
        bracketed = host.startswith("[") and host.endswith("]")
        if bracketed is not (":" in host):
            raise ValueError("an IPv6 address stands in brackets")
        return parse_address(host[1:-1] if bracketed else host), number
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}; expected ADDRESS:PORT") from None


def _parse_time(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float:
    return parse_duration(ctx, parameter, value) if value else 0.0


@click.command(epilog="Example: sockhop backend maintenance 10.1.0.2:8080 --for 1h")
@click.argument("action", type=click.Choice(list(_STATES)))
@click.argument("backend", metavar="ADDRESS:PORT", callback=_parse_backend)
@click.option("--service", default="", metavar="NAME", help="In this service only.")
@click.option(
    "--for",
    "seconds",
    metavar="DURATION",
    callback=_parse_time,
    help="Until then, such as 30m or 1h; without it until `activate`.",
)
@output_option
@global_options
def command(
    action: str, backend: tuple[str, int], service: str, seconds: float, output: str
) -> int:
    """Take a backend out by hand, whatever the manifests say, or (activate) end that.

    It gets no new connections; open ones meet the service's intent for that state. It holds in all
    services that have the backend, across restarts of the agent, and ends when the backend is in
    the manifest no more. `activate` puts the manifest in force again. Exit status 1 if there is
    no such backend, or, for activate, nothing was said of it by hand.
    """
    from sockhop.agent.client import set_backend  # noqa: PLC0415 (slow to import)
    from sockhop.agent.state import BackendRequest  # noqa: PLC0415

    state = _STATES[action]
    if seconds and state is BackendState.ACTIVE:
        raise click.UsageError("--for is for quarantine and maintenance")
    said = set_backend(api_path(), BackendRequest(*backend, state, service, seconds))
    if said is None:
        raise SystemLackError(
            f"{api_path()}: no agent is running there",
            hint="a running agent sets it and keeps it; or name its socket with --api",
        )
    if output in ("json", "yaml"):
        print_value(said, output)
        return int(not said)
    for each in said:
        where = f"{endpoint(each.address, each.port)} of {each.service}"
        over = f"{where}: what the manifest says again"
        click.echo(over if state is BackendState.ACTIVE else override_text(each))
    if not said:
        where = endpoint(*backend) + (f" of {service}" if service else "")
        nothing = "nothing was said of it by hand"
        none = "no service has that backend" if not service else "there is no such backend"
        click.echo(f"{where}: {nothing if state is BackendState.ACTIVE else none}", err=True)
    return int(not said)


def override_text(each: "Override") -> str:
    """Return which state a backend has by hand, and for how long."""
    from sockhop.agent.orders import now  # noqa: PLC0415 (slow to import)

    left = "" if each.until is None else f" for {age(max(each.until - now(), 0) + 0.5)}"
    return f"{endpoint(each.address, each.port)} of {each.service}: {each.state}{left}"
