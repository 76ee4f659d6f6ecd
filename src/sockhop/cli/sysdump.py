"""`sockhop sysdump`."""

import errno
import io
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import click

from sockhop.cli.options import global_options
from sockhop.cli.output import counted
from sockhop.cli.scrub import scrub_log
from sockhop.cli.sysdump_parts import PARTS, Part
from sockhop.errors import InputError, SockhopError, SystemLackError

__all__ = ["command"]

_INTRODUCTION = """\
Made by `sockhop sysdump` for a bug report. Addresses, ports and names of services, cgroups and
programs are in it. Payloads, environments, command lines and manifests are not, and what looks
like a secret is replaced. Look through it before you give it away.

"""


@click.command(epilog="Example: sockhop sysdump")
@click.option(
    "--to",
    "target",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The archive to write [default: sockhop-sysdump-TIME.tar.gz].",
)
@global_options
def command(target: Path | None) -> None:
    """Write one archive for a bug report: status, features, maps, audit, events, log.

    It holds no payload, no environment and no manifest, and what looks like a secret is replaced;
    addresses and names stay. Only its owner can read it. What cannot be collected is named in it,
    and on stderr. Changes nothing; whoever interrupts it leaves nothing behind.
    """
    name = time.strftime("sockhop-sysdump-%Y%m%dT%H%M%SZ", time.gmtime())
    target = target or Path(f"{name}.tar.gz")
    try:
        with _new_file(target) as file:
            failures = _write(file, name)
    except OSError as error:
        raise SystemLackError(f"{target}: {error.strerror or error}") from None
    click.echo(target)
    for each in failures:
        click.echo(f"note: not in it: {each}", err=True)


def _write(file: BinaryIO, directory: str) -> list[str]:
    """Write the archive; return what could not be collected, with the reason."""
    now, failures = int(time.time()), []
    lines = [_INTRODUCTION]
    with tarfile.open(fileobj=file, mode="w:gz") as archive:

        def add(name: str, data: bytes) -> None:
            entry = tarfile.TarInfo(f"{directory}/{name}")
            entry.size, entry.mtime, entry.mode = len(data), now, 0o600
            archive.addfile(entry, io.BytesIO(data))

        for part in _progress():
            try:
                data = part.collect()
            except Exception as error:  # noqa: BLE001 (what is broken is what this is for)
                reason = error.message if isinstance(error, SockhopError) else repr(error)
                failures.append(f"{part.name}: {scrub_log(reason)}")
                continue
            if data:
                add(part.name, data)
            lines.append(f"{part.name}: {part.about}{'' if data else ': there is nothing'}\n")
        lines += [f"not in it: {each}\n" for each in failures]
        add("README.txt", "".join(lines).encode())
    return failures


def _progress() -> Iterator[Part]:
    """Yield the parts; on a terminal, show which one it is."""
    shows = sys.stderr.isatty()
    for number, part in enumerate(PARTS, 1):
        if shows:
            line = f"{number} of {counted(len(PARTS), 'part')}: {part.name}"
            click.echo(f"\r\x1b[K{line}", nl=False, err=True)
        yield part
    if shows:
        click.echo("\r\x1b[K", nl=False, err=True)


@contextmanager
def _new_file(target: Path) -> Iterator[BinaryIO]:
    """Yield a new file, only for its owner, which is at *target* once it is complete.

    Until then it has no name (O_TMPFILE, open(2)), or where the file system cannot do that, one
    that is removed again.
    """
    if target.exists():
        raise InputError(f"{target}: this exists already", hint="name another file with --to")
    try:
        fd = os.open(target.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise InputError(f"{target}: {error.strerror}") from None
        with _named_file(target) as file:
            yield file
        return
    with os.fdopen(fd, "wb") as file:
        yield file
        file.flush()
        os.fsync(fd)
        # Given a directory, Python follows the link; without, link(2) would not.
        _give_name(Path(f"/proc/self/fd/{fd}"), target, src_dir_fd=fd)


@contextmanager
def _named_file(target: Path) -> Iterator[BinaryIO]:
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        fd = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(f"{target}: {error.strerror}") from None
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
        _give_name(partial, target)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def _give_name(made: Path, target: Path, src_dir_fd: int | None = None) -> None:
    """Never in the place of another file."""
    try:
        os.link(made, target, src_dir_fd=src_dir_fd)
    except OSError as error:
        raise InputError(f"{target}: {error.strerror}") from None
