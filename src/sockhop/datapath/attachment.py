"""A set of hooks of one bpffs directory, attached and detached together; and what is ours."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from sockhop.errors import InputError, SockhopError, SystemLackError
from sockhop.kernel.cgroups import (
    AttachType,
    attached_programs,
    cgroup_path,
    cgroup_root,
    groups_below,
    open_cgroup,
)
from sockhop.kernel.links import attach, check_room, detach, detach_programs, read_link
from sockhop.kernel.maps import map_info, open_pinned
from sockhop.kernel.objects import identify_program, open_program
from sockhop.kernel.syscall import KernelError

__all__ = [
    "Owner",
    "attach_hooks",
    "cgroup_of_links",
    "check_hooks",
    "detach_hooks",
    "programs_in_force",
]

_EVERYWHERE = 1_000_000
"""Cgroups to look at where none may be passed over."""


class Owner:
    """Tells whether a program is ours: one of its maps is pinned in our directory.

    A tag changes with every build, and a name anybody can take. Call it with a program's id.
    """

    def __init__(self, maps: Path) -> None:
        """*maps*: the directory with the pins of our maps, which need not exist."""
        self._maps = _pinned_ids(maps)
        self._known: dict[int, bool] = {}

    def __call__(self, program: int) -> bool:
        if not self._maps:
            return False
        if program not in self._known:
            self._known[program] = self._uses_our_maps(program)
        return self._known[program]

    @property
    def has_maps(self) -> bool:
        """Whether there are maps of ours at all; without them nothing can be ours."""
        return bool(self._maps)

    def _uses_our_maps(self, program: int) -> bool:
        try:
            return not self._maps.isdisjoint(identify_program(program).map_ids)
        except FileNotFoundError:
            return False


def programs_in_force(
    hooks: Iterable[AttachType], links: Path, owner: Owner, cgroup: Path | None
) -> dict[AttachType, int]:
    """Return the ids of the programs of ours at *hooks*.

    They are those of the pinned links, unless the link's cgroup is gone, else what is attached
    to *cgroup* without one.
    """
    found: dict[AttachType, int] = {}
    rest = []
    for hook in hooks:
        link = read_link(links / hook.hook)
        if link is not None and link.cgroup:
            found[hook] = link.program
        else:
            rest.append(hook)
    if rest and cgroup is not None and cgroup.is_dir() and owner.has_maps:
        with open_cgroup(cgroup) as fd:
            for hook in rest:
                found.update((hook, program) for program in filter(owner, _alone(fd, hook)))
    return found


def cgroup_of_links(hooks: Iterable[AttachType], links: Path) -> Path | None:
    """Return the cgroup of the first pinned link whose cgroup can be found, else None."""
    with open_cgroup(cgroup_root()) as fd:
        for hook in hooks:
            link = read_link(links / hook.hook)
            if link is not None and link.cgroup:
                with suppress(KernelError):
                    return cgroup_path(fd, link.cgroup)
    return None


def check_hooks(hooks: Iterable[AttachType], cgroup: int, links: Path, owner: Owner) -> None:
    """Raise SystemLackError where it shows beforehand that a hook cannot be attached."""
    for hook in hooks:
        check_room(cgroup, hook, links / hook.hook, is_ours=owner)


def attach_hooks(
    programs: Mapping[AttachType, int], cgroup: int, links: Path, owner: Owner
) -> None:
    """Attach every program (a descriptor) to the cgroup (a descriptor), in the order given.

    Several hooks are not one atomic update: put first what undoes the work of the others. Where
    one cannot be attached, those before it get their programs of before again.
    """
    check_hooks(programs, cgroup, links, owner)
    with ExitStack() as opened:
        before = {hook: _before(hook, cgroup, links, owner, opened) for hook in programs}
        done: list[AttachType] = []
        try:
            for hook, program in programs.items():
                attach(program, cgroup, hook, links / hook.hook, is_ours=owner)
                done.append(hook)
        except SockhopError as error:
            lost = [
                hook.hook
                for hook in reversed(done)
                if not _restore(hook, before[hook], cgroup, links, owner)
            ]
            if lost:
                raise SystemLackError(
                    f"{error.message}; and the program of before could not be put back "
                    f"at {', '.join(lost)}",
                    hint=error.hint,
                ) from error
            raise


def detach_hooks(
    hooks: Iterable[AttachType], links: Path, owner: Owner, cgroup: Path | None = None
) -> None:
    """Detach *hooks*, in the order given: their links, or what has none.

    The latter is looked for in the whole hierarchy, and where that is another at *cgroup* and
    below. Programs that are not ours stay. It ends at the first hook that cannot be detached, with
    an error; that and those after it are in force.
    """
    hooks = list(hooks)
    unlinked = [hook for hook in hooks if read_link(links / hook.hook) is None]
    groups = _groups_without_links(unlinked, owner, cgroup)
    for hook in hooks:
        detach(links / hook.hook)
        for group in groups.get(hook, ()):
            with suppress(InputError), open_cgroup(group) as fd:  # InputError: gone meanwhile
                detach_programs(fd, hook, is_ours=owner)


def _groups_without_links(
    hooks: list[AttachType], owner: Owner, cgroup: Path | None
) -> dict[AttachType, list[Path]]:
    """Where programs of ours are attached at *hooks*."""
    found: dict[AttachType, list[Path]] = defaultdict(list)
    if not hooks or not owner.has_maps:
        return found
    tops = {cgroup_root()}
    if cgroup is not None and not cgroup.resolve().is_relative_to(cgroup_root()):
        tops.add(cgroup)
    for top in tops:
        for group, fd in groups_below(top, limit=_EVERYWHERE):
            for hook in hooks:
                if any(map(owner, attached_programs(fd, hook).programs)):
                    found[hook].append(group)
    return found


class _Before(NamedTuple):
    """The program of ours at a hook before it was attached: its id, 0 for none, and a descriptor.

    The descriptor holds the program, which an update may unload; None where it cannot be had.
    """

    number: int
    program: int | None


def _before(hook: AttachType, cgroup: int, links: Path, owner: Owner, opened: ExitStack) -> _Before:
    link = read_link(links / hook.hook)
    if link is not None:
        number = link.program if link.cgroup == os.fstat(cgroup).st_ino else 0
    else:
        number = next(filter(owner, _alone(cgroup, hook)), 0)
    if not number:
        return _Before(0, None)
    try:
        program = open_program(number)
    except (FileNotFoundError, KernelError):  # KernelError: no CAP_SYS_ADMIN
        return _Before(number, None)
    opened.callback(os.close, program)
    return _Before(number, program)


def _alone(cgroup: int, hook: AttachType) -> tuple[int, ...]:
    """What was attached without flags; only that may be ours without a link of ours."""
    present = attached_programs(cgroup, hook)
    return () if present.is_shared else present.programs


def _restore(hook: AttachType, before: _Before, cgroup: int, links: Path, owner: Owner) -> bool:
    """Put the hook back to what it was; False where that fails."""
    pin = links / hook.hook
    try:
        if before.program is not None:
            attach(before.program, cgroup, hook, pin, is_ours=owner)
        elif before.number:
            return False
        elif not detach(pin):
            detach_programs(cgroup, hook, is_ours=owner)
    except (OSError, SockhopError):
        return False
    return True


def _pinned_ids(directory: Path) -> frozenset[int]:
    found = set()
    for pin in sorted(directory.iterdir()) if directory.is_dir() else ():
        with suppress(FileNotFoundError):  # another process is removing them
            fd = open_pinned(pin)
            try:
                found.add(map_info(fd).id)
            finally:
                os.close(fd)
    return frozenset(found)
