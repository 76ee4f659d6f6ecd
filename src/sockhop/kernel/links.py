"""The association of a program with a hook of a cgroup (kernel/bpf/cgroup.c, kernel/bpf/syscall.c).

Two ways: a bpf_link, which lasts as long as its pin, and where that cannot be, PROG_ATTACH
without flags, which lasts until it is undone. Both replace a program of ours while it runs.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

from sockhop.errors import SystemLackError
from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.cgroups import (
    Attached,
    AttachType,
    attached_programs,
    cgroup_path,
    groups_above,
    open_cgroup,
)
from sockhop.kernel.maps import open_pinned
from sockhop.kernel.objects import identify_program, open_program
from sockhop.kernel.syscall import KernelError, check

__all__ = [
    "IsOurs",
    "LinkInfo",
    "Occupied",
    "attach",
    "check_room",
    "detach",
    "detach_programs",
    "read_link",
    "unpin",
]

IsOurs: TypeAlias = Callable[[int], bool]
"""Tells of a program id whether the program is ours."""


class Occupied(SystemLackError):
    """Somebody else's program holds the hook and lets no other in."""


class LinkInfo(NamedTuple):
    """What the kernel says of a cgroup link: ids of its program and its cgroup (0: it is gone)."""

    program: int
    cgroup: int


def read_link(pin: Path) -> LinkInfo | None:
    """Return what the pinned link is; None without such a pin."""
    with _pinned(pin) as link:
        return None if link is None else _info(link, pin)


def attach(
    program: int, cgroup: int, attach_type: AttachType, pin: Path, *, is_ours: IsOurs
) -> None:
    """Make *program* run at *attach_type* of *cgroup*, from now on without interruption.

    A pinned link is updated in place: at no moment does neither program run. A link whose
    cgroup is gone (ENOLINK) is replaced. Without a link one is made and pinned. Where the
    kernel has no links, or a program of ours without flags forbids one, PROG_ATTACH without
    flags takes that program's place. It would also take a stranger's: Occupied says whose it is.

    On any error what was in force stays so.
    """
    with _pinned(pin) as link:
        if link is not None and _update(link, program, cgroup, pin):
            return
        if link is not None:
            unpin(pin)
    created = lib.bpf_link_create(program, cgroup, attach_type, ffi.NULL)
    has_links = created not in (-errno.EINVAL, -errno.EOPNOTSUPP) or _kernel_has_links()
    if created == -errno.EPERM or not has_links:
        _attach_without_flags(program, cgroup, attach_type, is_ours)
        return
    check(created, f"attaching at {attach_type.hook}")
    try:
        check(lib.bpf_obj_pin(created, str(pin).encode()), f"pinning the link {pin}")
    finally:
        os.close(created)


def detach(pin: Path) -> bool:
    """End the association that *pin* keeps, and remove the pin; False if there is no such pin.

    SystemLackError where it cannot be removed; then it is still in force. Removing the last pin
    alone detaches later, from a work queue, in no order with others. So detach too, which is
    synchronous: Linux kernel commit 73b11c2ab072 ("bpf: Add support for forced LINK_DETACH
    command") (in v5.9).
    """
    with _pinned(pin) as link:
        if link is None:
            return False
        unpin(pin)
        lib.bpf_link_detach(link)  # where it fails, closing the descriptor does it
    return True


def detach_programs(cgroup: int, attach_type: AttachType, *, is_ours: IsOurs) -> tuple[int, ...]:
    """Detach the programs of ours that were attached to the cgroup itself without a link.

    Return their ids. Programs of others stay.
    """
    found = tuple(filter(is_ours, attached_programs(cgroup, attach_type).programs))
    for number in found:
        program = open_program(number)
        try:
            result = lib.bpf_prog_detach2(program, cgroup, attach_type)
        finally:
            os.close(program)
        if result == -errno.ENOENT:
            raise KernelError(
                f"detaching program {number} from {attach_type.hook}",
                errno.ENOENT,
                hint="a link that is not pinned here holds it (`bpftool link show` names it)",
            )
        check(result, f"detaching program {number} from {attach_type.hook}")
    return found


def check_room(cgroup: int, attach_type: AttachType, pin: Path, *, is_ours: IsOurs) -> None:
    """Raise SystemLackError where :func:`attach` could not, as far as that shows; change nothing.

    Occupied: a program, here or above, lets no other in, as hierarchy_allows_attach() decides
    (kernel/bpf/cgroup.c). Else the pinned link belongs to another cgroup.
    """
    with _pinned(pin) as link:
        if link is not None:
            _is_gone(_info(link, pin), cgroup, pin)
    _refuse_strangers(cgroup, attach_type, is_ours)


def unpin(pin: Path) -> None:
    """Remove a pin; SystemLackError where that fails."""
    try:
        pin.unlink()
    except OSError as error:
        raise SystemLackError(
            f"{pin}: this pin cannot be removed: {error.strerror}",
            hint="what it keeps stays so; is the BPF filesystem mounted read-only?",
        ) from None


def _attach_without_flags(
    program: int, cgroup: int, attach_type: AttachType, is_ours: IsOurs
) -> None:
    _refuse_strangers(cgroup, attach_type, is_ours)
    here = attached_programs(cgroup, attach_type)
    if here.is_shared and not _kernel_has_links():
        # The kernel would refuse too, but not say because of whom.
        _refuse_stranger(here, attach_type, _path(cgroup), is_ours)
    check(
        lib.bpf_prog_attach(program, cgroup, attach_type, 0),
        f"attaching at {attach_type.hook} without flags",
    )


def _refuse_strangers(cgroup: int, attach_type: AttachType, is_ours: IsOurs) -> None:
    group = _path(cgroup)
    here = attached_programs(cgroup, attach_type)
    if not here.is_shared:
        _refuse_stranger(here, attach_type, group, is_ours)
    for above in groups_above(group):
        with open_cgroup(above) as fd:
            there = attached_programs(fd, attach_type)
        if there.forbids_below:
            _refuse_stranger(there, attach_type, above, is_ours)
            raise Occupied(
                f"{attach_type.hook}: a program of ours is attached without flags at {above}, "
                f"so none can be at {group}",
                hint="name that cgroup with --cgroup, or end it with `sockhop detach`",
            )


def _refuse_stranger(
    present: Attached, attach_type: AttachType, group: Path, is_ours: IsOurs
) -> None:
    for number in present.programs:
        if not is_ours(number):
            raise Occupied(
                f"{attach_type.hook} of {group} is taken by {_described(number)}, "
                "which is not ours and lets no other in",
                hint="stop the tool that attached it, or end it with "
                f"`bpftool cgroup detach {group} {attach_type.hook} id {number}`",
            )


def _described(number: int) -> str:
    try:
        program = identify_program(number)
    except FileNotFoundError:
        return f"program {number} (gone meanwhile)"
    except KernelError:
        return f"program {number} (its name can be read with CAP_SYS_ADMIN)"
    return f"program {number} '{program.name}' (tag {program.tag})"


def _update(link: int, program: int, cgroup: int, pin: Path) -> bool:
    """Let the link run *program*; False if the link's cgroup is gone."""
    if _is_gone(_info(link, pin), cgroup, pin):
        return False
    result = lib.bpf_link_update(link, program, ffi.NULL)
    if result == -errno.ENOLINK:
        return False
    check(result, f"updating the link {pin}")
    return True


def _is_gone(link: LinkInfo, cgroup: int, pin: Path) -> bool:
    """Whether the link's cgroup is gone; SystemLackError if it is another than *cgroup*."""
    if link.cgroup == os.fstat(cgroup).st_ino:
        return False
    # One that was removed may be held by open sockets: then the link is not defunct yet.
    try:
        where = str(cgroup_path(cgroup, link.cgroup) or "") if link.cgroup else ""
    except KernelError:  # no CAP_DAC_READ_SEARCH
        where = f"the cgroup with the id {link.cgroup}"
    if not where:
        return True
    raise SystemLackError(
        f"{pin}: this link is attached to {where}, not to {_path(cgroup)}",
        hint="name that cgroup with --cgroup, or end it with `sockhop detach`",
    )


def _kernel_has_links() -> bool:
    """Whether bpf(2) knows BPF_LINK_CREATE.

    Linux kernel commit af6eea57437a ("bpf: Implement bpf_link-based cgroup BPF program
    attachment") (in v5.7). Before it every such call is EINVAL, whatever the arguments.
    """
    return bool(lib.bpf_link_create(-1, -1, AttachType.CONNECT4, ffi.NULL) == -errno.EBADF)


@contextmanager
def _pinned(pin: Path) -> Iterator[int | None]:
    """Yield a descriptor of the pinned link, None without such a pin."""
    try:
        link = open_pinned(pin)
    except FileNotFoundError:
        yield None
        return
    try:
        yield link
    finally:
        os.close(link)


def _info(link: int, pin: Path) -> LinkInfo:
    info = ffi.new("struct bpf_link_info *")
    size = ffi.new("__u32 *", ffi.sizeof("struct bpf_link_info"))
    check(lib.bpf_obj_get_info_by_fd(link, info, size), f"reading the link {pin}")
    return LinkInfo(info.prog_id, info.cgroup.cgroup_id)


def _path(cgroup: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{cgroup}"))
