"""`sockhop render`."""

from pathlib import Path

import click
import msgspec

from sockhop.cli.options import manifests_option, output_option
from sockhop.cli.output import Column, phrases, print_rows, print_value
from sockhop.model import Clients, Desired, Frontend, Policy, Redirect, Service

__all__ = ["command"]

_COLUMNS = (
    Column("SERVICE", "service"),
    Column("FRONTEND", "frontend"),
    Column("TYPE", "type"),
    Column("BACKENDS", "backends"),
    Column("ALGORITHM", "algorithm", wide=True),
)
_POLICY_COLUMNS = (
    Column("POLICY", "policy"),
    Column("ACTION", "action"),
    Column("CLIENTS", "clients"),
    Column("TARGETS", "targets"),
    Column("REFUSED", "refused", text=phrases),
)


class _Row(msgspec.Struct):
    service: str
    frontend: str
    type: str
    backends: list[str]
    algorithm: str


class _PolicyRow(msgspec.Struct):
    policy: str
    action: str
    clients: str
    targets: list[str]
    refused: list[str]


@click.command(epilog="Example: sockhop render -f services.yaml -o json")
@manifests_option
@click.option("--node-name", metavar="NAME", default="", help="This node's name in Kubernetes.")
@output_option
def command(paths: tuple[Path, ...], node_name: str, output: str) -> None:
    """Print the desired state that manifests describe. Needs no root, touches no kernel.

    What is ignored is said on stderr.
    """
    from sockhop.sources.files import load  # noqa: PLC0415 (slow to import)

    loaded = load(paths, node_name=node_name)
    for warning in loaded.warnings:
        click.echo(f"sockhop: {warning}", err=True)
    if output in ("json", "yaml"):
        print_value(loaded.desired, output)
    else:
        print_rows(_rows(loaded.desired), _COLUMNS, output)
        if policies := _policy_rows(loaded.desired):
            click.echo()
            print_rows(policies, _POLICY_COLUMNS, output)


def _rows(desired: Desired) -> list[_Row]:
    return [_row(service, frontend) for service, frontend in desired.frontends()]


def _row(service: Service, frontend: Frontend) -> _Row:
    return _Row(
        service.name,
        str(frontend),
        frontend.type,
        [str(backend) for backend in frontend.backends],
        service.algorithm,
    )


def _policy_rows(desired: Desired) -> list[_PolicyRow]:
    return [
        *map(_policy_row, desired.policies),
        *map(_redirect_row, desired.redirects),
    ]


def _policy_row(policy: Policy) -> _PolicyRow:
    return _PolicyRow(
        policy.name,
        policy.action,
        str(policy.clients or Clients()),
        list(map(str, policy.rules)),
        list(policy.refused),
    )


def _redirect_row(redirect: Redirect) -> _PolicyRow:
    return _PolicyRow(
        redirect.name,
        "redirect",
        str(Clients(exclude=redirect.exempt)),
        list(map(str, redirect.frontends)),
        list(redirect.refused),
    )
