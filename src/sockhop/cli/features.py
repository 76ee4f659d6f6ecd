"""`sockhop features`."""

import os
from pathlib import Path

import click
import msgspec

from sockhop.cli.features_diff import print_differences, read_pair
from sockhop.cli.options import bpffs_path, global_options, output_option
from sockhop.cli.output import Column, print_rows, print_value, table
from sockhop.diagnose.nodes import Node, compare, complete, own_node
from sockhop.errors import SystemLackError
from sockhop.kernel.features import Feature, probe_features
from sockhop.kernel.host import Fact, host_facts

__all__ = ["command", "this_node"]

_COLUMNS = (
    Column("FEATURE", "feature"),
    Column("AVAILABLE", "available"),
    Column("USED FOR", "used_for"),
    Column("SINCE", "since", wide=True),
    Column("WITHOUT IT", "without", wide=True),
)


class _Row(msgspec.Struct):
    feature: str
    available: str
    used_for: str
    since: str
    without: str


@click.command(epilog="Example: sockhop features --diff node2.json")
@click.option(
    "--diff",
    "others",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="OTHER",
    help="Compare this node with the one that a file tells of: made there with `features -o json`, "
    "a bpf_features.h of Cilium's, or raw BTF. Given twice: those two.",
)
@output_option
@global_options
def command(others: tuple[Path, ...], output: str) -> int:
    """List what this kernel can do for sockhop, each thing found by trying it.

    Nothing is attached, and nothing stays behind. Exit status 0 if all that balancing needs is
    there, 3 if not. `-o wide` adds the kernel commit and version each thing came with, and what
    happens without it; `-o json` has the kernel's reasons, and settings, build options and
    structures to compare. With --diff only what differs, and what each is used for; exit status 1
    if anything does.
    """
    if others:
        first, other = read_pair(others)
        if first is None:
            first = complete(this_node(bpffs_path()), other)
        return print_differences(compare(first, other), output)
    host, features = _own(bpffs_path())
    missing = [f.name for f in features if f.required and f.available is False]
    unknown = [f.name for f in features if f.required and f.available is None]
    if output in ("json", "yaml"):
        print_value(own_node(host, features), output)
    else:
        facts = list(host.items())
        print_rows([_row(feature) for feature in features], _COLUMNS, output)
        click.echo("\n" + table(facts))
    if missing:
        raise SystemLackError(
            f"balancing needs what is missing here: {', '.join(missing)}",
            hint="`sockhop features -o json` has the kernel's reasons",
        )
    if unknown:
        raise SystemLackError(
            f"{len(unknown)} things that balancing needs could not be tried",
            hint="run as root"
            if os.geteuid()
            else "this root lacks the capabilities that the facts name",
        )
    return 0


def this_node(pins: Path) -> Node:
    """Return what is known of this node."""
    return own_node(*_own(pins))


def _own(pins: Path) -> tuple[dict[str, str], list[Feature]]:
    """Return the facts of this host, and what its kernel can do."""
    features = probe_features(pins)
    facts = [*host_facts(), _provenance(pins), _ending(features)]
    return {fact.name: fact.value for fact in facts}, features


def _row(feature: Feature) -> _Row:
    available = {True: "yes", False: f"no: {feature.reason}", None: feature.reason}
    return _Row(
        feature.name,
        available[feature.available],
        feature.used_for,
        feature.since,
        feature.without,
    )


def _ending(features: list[Feature]) -> Fact:
    """By which engine sockets are ended."""
    available = {feature.name for feature in features if feature.available}
    ways = []
    if {"iter/tcp", "iter/udp", "bpf_sock_destroy"} <= available:
        ways.append("iterator")
    if {"SOCK_DESTROY for TCP", "SOCK_DESTROY for UDP"} <= available:
        ways.append("netlink")
    return Fact("ending sockets", ", or else ".join(ways) or "cannot be done")


def _provenance(pins: Path) -> Fact:
    """Where the balanced sockets' provenance is kept, if anything is installed."""
    from sockhop.datapath.balancer import BalanceMaps, NotInstalled  # noqa: PLC0415
    from sockhop.datapath.records import Setting  # noqa: PLC0415

    try:
        with BalanceMaps(pins) as maps:
            fallback = maps.setting(Setting.FALLBACK)
    except NotInstalled:
        return Fact("provenance", "nothing is installed")
    except SystemLackError as error:
        return Fact("provenance", f"unknown: {error.message}")
    return Fact(
        "provenance",
        "in sk_storage and, where that was refused, in a map (see net.core.optmem_max)"
        if fallback
        else "in sk_storage",
    )
