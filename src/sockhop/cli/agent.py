"""`sockhop agent`."""

from pathlib import Path

import click

from sockhop.cli.options import (
    api_path,
    bpffs_path,
    cgroup_path,
    global_options,
    manifests_option,
)

__all__ = ["command"]


@click.command(epilog="Example: sockhop agent -f /etc/sockhop --metrics 127.0.0.1:9464")
@manifests_option
@click.option(
    "--metrics", default="", metavar="HOST:PORT", help="Serve /metrics and /healthz here."
)
@click.option("--node-name", default="", help="This node's name in Kubernetes.")
@click.option("--detach-on-exit", is_flag=True, help="End balancing when the agent stops.")
@click.option(
    "--settle-every",
    type=click.FloatRange(1, 60),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How often live counts are reconciled with the sockets.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
@global_options
def command(
    paths: tuple[Path, ...],
    metrics: str,
    node_name: str,
    detach_on_exit: bool,
    settle_every: float,
    verbose: bool,
) -> None:
    """Follow service manifests and balance what they say, until SIGTERM.

    The kernel goes on balancing when the agent stops; `sockhop detach` ends it. SIGHUP reads
    the manifests again; changes of the files are seen without it.
    """
    from sockhop.agent.agent import AgentOptions, run_agent  # noqa: PLC0415 (slow to import)
    from sockhop.agent.log import set_up_log  # noqa: PLC0415

    set_up_log(verbose=verbose)
    run_agent(
        AgentOptions(
            paths=paths,
            cgroup=cgroup_path(),
            pins=bpffs_path(),
            api=api_path(),
            metrics=metrics,
            node_name=node_name,
            detach_on_exit=detach_on_exit,
            settle_every=settle_every,
        )
    )
