"""`sockhop completion bash|zsh|fish`."""

import click
from click.shell_completion import get_completion_class

__all__ = ["command"]


@click.command(epilog="Example: sockhop completion bash > /etc/bash_completion.d/sockhop")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    found = get_completion_class(shell)
    if found is None:
        raise click.UsageError(f"click knows no completion for {shell}")
    click.echo(found(ctx.find_root().command, {}, "sockhop", "_SOCKHOP_COMPLETE").source())
