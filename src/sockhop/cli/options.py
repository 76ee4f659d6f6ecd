"""Options that every command takes, before or after its name, each with an environment variable."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

__all__ = [
    "bpffs_path",
    "api_path",
    "cgroup_path",
    "global_options",
    "manifests_option",
    "output_option",
    "parse_duration",
    "parse_period",
]

F = TypeVar("F", bound=Callable[..., Any])

_DEFAULTS = {"bpffs": Path("/sys/fs/bpf/sockhop"), "api": Path("/run/sockhop/api.sock")}
_META = "sockhop.options"
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


def _keep(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    # What stands after the command's name is parsed last and wins, but not the environment, which
    # the command's own copy of the option sees once more.
    if value is None or parameter.name is None:
        return
    chosen = ctx.meta.setdefault(_META, {})
    if ctx.get_parameter_source(parameter.name) is ParameterSource.ENVIRONMENT:
        chosen.setdefault(parameter.name, value)
    else:
        chosen[parameter.name] = value


def global_options(command: F) -> F:
    """Add --cgroup, --bpffs and --api; read them with the functions below."""
    for name, text in (
        ("api", "The agent's Unix socket [default: /run/sockhop/api.sock]."),
        ("bpffs", "Where maps and links are pinned [default: /sys/fs/bpf/sockhop]."),
        ("cgroup", "The cgroup2 group whose processes are balanced [default: the root]."),
    ):
        command = click.option(
            f"--{name}",
            envvar=f"SOCKHOP_{name.upper()}",
            type=click.Path(path_type=Path, readable=False),
            callback=_keep,
            expose_value=False,
            help=f"{text} Environment: SOCKHOP_{name.upper()}.",
        )(command)
    return command


def _chosen(name: str) -> Path | None:
    found: Path | None = click.get_current_context().meta.get(_META, {}).get(name)
    return found


def bpffs_path() -> Path:
    """Return the directory for pins."""
    return _chosen("bpffs") or _DEFAULTS["bpffs"]


def api_path() -> Path:
    """Return the path of the agent's socket."""
    return _chosen("api") or _DEFAULTS["api"]


def cgroup_path() -> Path:
    """Return the cgroup to attach to; by default the root of the hierarchy, from mountinfo."""
    from sockhop.kernel.cgroups import cgroup_root  # noqa: PLC0415 (needs the extension)

    return _chosen("cgroup") or cgroup_root()


def parse_duration(ctx: click.Context, parameter: click.Parameter, value: str) -> float:
    """Return the seconds of 500ms, 2s, 1m; a callback of click."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|)", value)
    if found is None or not float(found[1]):
        raise click.BadParameter(f"{value!r} is no duration such as 500ms, 2s or 1m")
    return float(found[1]) * _SECONDS[found[2]]


def parse_period(ctx: click.Context, parameter: click.Parameter, value: str) -> float:
    """Do as :func:`parse_duration`, but 0 is possible, too."""
    return 0.0 if value == "0" else parse_duration(ctx, parameter, value)


output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "wide", "json", "yaml"]),
    default="table",
    show_default=True,
    help="How to print.",
)

manifests_option = click.option(
    "-f",
    "--file",
    "paths",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A manifest or a directory of manifests; may be given several times.",
)
