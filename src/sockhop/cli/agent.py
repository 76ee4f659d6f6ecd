"""`sockhop agent`."""

from pathlib import Path
from typing import Any

import click

from sockhop.cli.options import (
    api_path,
    bpffs_path,
    cgroup_path,
    global_options,
    manifests_option,
    parse_duration,
    parse_period,
)

__all__ = ["command"]

_MOST_ENTRIES = 16_777_216


def _parse_sizes(
    ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, int]:
    from sockhop.datapath.balancer import SIZED_MAPS  # noqa: PLC0415 (needs the extension)

    sizes = {}
    for value in values:
        name, _, number = value.partition("=")
        if name not in SIZED_MAPS:
            raise click.BadParameter(f"{value!r}: the map is one of {', '.join(SIZED_MAPS)}")
        if not number.isdecimal() or not 1 <= int(number) <= _MOST_ENTRIES:
            raise click.BadParameter(f"{value!r}: the size is a number from 1 to {_MOST_ENTRIES:,}")
        sizes[name] = int(number)
    return sizes


def _parse_settle(ctx: click.Context, parameter: click.Parameter, value: str) -> float:
    seconds = parse_duration(ctx, parameter, value)
    if not 1 <= seconds <= 60:
        raise click.BadParameter(f"{value!r} is not from 1s to 60s")
    return seconds


def _check_addresses(
    ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    from sockhop.agent.splicing import parse_splice_address  # noqa: PLC0415 (slow to import)

    for value in values:
        parse_splice_address(value)
    return values


@click.command(epilog="Example: sockhop agent -f /etc/sockhop --metrics 127.0.0.1:9464")
@manifests_option
@click.option(
    "--metrics", default="", metavar="HOST:PORT", help="Serve /metrics and /healthz here."
)
@click.option("--node-name", metavar="NAME", default="", help="This node's name in Kubernetes.")
@click.option("--detach-on-exit", is_flag=True, help="End balancing when the agent stops.")
@click.option(
    "--settle-every",
    default="30s",
    show_default=True,
    metavar="DURATION",
    callback=_parse_settle,
    help="How often live counts are reconciled with the sockets, 1s to 60s.",
)
@click.option(
    "--map-size",
    "map_sizes",
    multiple=True,
    callback=_parse_sizes,
    metavar="MAP=N",
    help="Entries of a map when it is made, such as slots=1000000; `sockhop status` lists maps.",
)
@click.option(
    "--coexist",
    is_flag=True,
    help="Start even if another tool's connect or sendmsg programs are on the cgroup or below.",
)
@click.option(
    "--brake",
    type=click.Choice(["on", "off"]),
    default="on",
    show_default=True,
    help="Whether changes that take most backends end sockets only after `sockhop approve`.",
)
@click.option(
    "--approve-above",
    type=click.IntRange(min=0),
    metavar="N",
    help="So do those that may end more than N sockets.",
)
@click.option(
    "--splice-netns",
    "splice_namespaces",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Splice connections between sockets of this network namespace and others opted in.",
)
@click.option(
    "--splice-cgroup",
    "splice_cgroups",
    multiple=True,
    metavar="PATH",
    help="The same for sockets made in this cgroup or below; the path begins at the root.",
)
@click.option(
    "--splice-address",
    "splice_addresses",
    multiple=True,
    callback=_check_addresses,
    metavar="ADDRESS[:PORT]",
    help="Splice connections to servers at this address: who dials it is opted in, too.",
)
@click.option(
    "--force-splice", is_flag=True, help="Splice even on a kernel that has a known serious fault."
)
@click.option(
    "--watch-every",
    default="30s",
    show_default=True,
    metavar="DURATION",
    callback=parse_period,
    help="How often to look whether connections of this node are harmed; 0: never.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
@global_options
def command(
    verbose: bool, brake: str, approve_above: int | None, force_splice: bool, **options: Any
) -> None:
    """Follow service manifests and balance what they say, until SIGTERM.

    The kernel goes on balancing when the agent stops; `sockhop detach` ends it. SIGHUP reads
    the manifests again; changes of the files are seen without it.

    It refuses to start where somebody else's programs may rewrite what clients dial, Cilium's
    for example. With --coexist it leaves Cilium's frontends to Cilium. Of other tools it cannot
    know the frontends: the program that runs first decides, and `sockhop status` says which.
    """
    from sockhop.agent.agent import AgentOptions, run_agent  # noqa: PLC0415 (slow to import)
    from sockhop.agent.brake import Limits  # noqa: PLC0415
    from sockhop.agent.log import set_up_log  # noqa: PLC0415
    from sockhop.agent.splicing import SpliceOptions  # noqa: PLC0415

    set_up_log(verbose=verbose)
    limits = Limits(brake=brake == "on", approve_above=approve_above)
    splice = SpliceOptions(
        namespaces=options.pop("splice_namespaces"),
        cgroups=options.pop("splice_cgroups"),
        addresses=options.pop("splice_addresses"),
        force=force_splice,
    )
    run_agent(
        AgentOptions(
            cgroup=cgroup_path(),
            pins=bpffs_path(),
            api=api_path(),
            limits=limits,
            splice=splice,
            **options,
        )
    )
