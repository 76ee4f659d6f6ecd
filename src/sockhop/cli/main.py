"""`sockhop`: finds the command, and turns what goes wrong into a sentence and an exit status."""

import importlib
import os
import sys

import click

from sockhop import __version__
from sockhop.cli.options import global_options
from sockhop.errors import SockhopError

__all__ = ["cli", "main"]

# One module per command, imported only when it is asked for: --help and completion stay quick.
_COMMANDS = {
    "advisories": "List known faults of this kernel, and try what can be tried.",
    "agent": "Follow service manifests and balance what they say.",
    "approve": "Let changes that are held end and move live sockets.",
    "audit": "Compare sockmaps with the sockets that they really hold.",
    "backend": "Take a backend out by hand, or back in.",
    "bench": "Measure sockhop beside its peers.",
    "bypass": "Let every connect pass untouched, at once (emergency switch).",
    "completion": "Print the shell completion script.",
    "demo": "Show the main job in a namespace of its own.",
    "detach": "End balancing and remove everything of ours from the kernel.",
    "doctor": "Say why connections to an address fail or hang.",
    "events": "List which sockets were ended or moved, why, and by which change.",
    "explain": "Say how a socket came to its backend, or why it has none.",
    "features": "List what this kernel can do for sockhop.",
    "get": "List services, backends, sockets, splices or policies.",
    "heal": "Delete stale entries of sockmaps.",
    "plan": "Print what an agent would change.",
    "render": "Print the desired state that manifests describe.",
    "resteer": "Move connected UDP sockets to another backend.",
    "sever": "End sockets by hand, in all network namespaces.",
    "status": "Say whether and how balancing works here.",
    "sysdump": "Write one archive for a bug report.",
    "trace": "Record what the kernel does for some connections.",
    "verify": "Compare what should be, what is installed and what sockets do.",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"sockhop.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_COMMANDS.items()))


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: sockhop agent -f services.yaml",
)
@click.version_option(__version__, prog_name="sockhop", message="%(prog)s %(version)s")
@global_options
def cli() -> None:
    """Balance, splice, sever and diagnose the connections of this node, at the socket.

    Exit status: 0 done; 1 the answer is no; 2 usage or bad input; 3 the kernel or a permission
    lacks something.
    """


def main() -> None:
    """Run the command line and exit."""
    sys.exit(_run())


def _run() -> int:
    try:
        result = cli(standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except SockhopError as error:
        return _complain(str(error), error.exit_status)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        return _complain(_usage(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        # The reader has seen enough; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("SOCKHOP_TRACEBACK"):
            raise
        return _complain(
            f"internal error: {type(error).__name__}: {error}\n"
            "  this is a bug in sockhop; SOCKHOP_TRACEBACK=1 shows where it happened",
            1,
        )


def _usage(error: click.UsageError) -> str:
    words = error.ctx.command_path if error.ctx else "sockhop"
    command = words.removeprefix("sockhop").strip()
    text = error.format_message().replace("\n\t", " ").rstrip(".")
    text = f"{text[:1].lower()}{text[1:]}"
    return f"{f'{command}: ' if command else ''}{text}\n  `{words} --help` says how"


def _complain(text: str, status: int) -> int:
    click.echo(f"sockhop: {text}", err=True)
    return status
