"""bpf_link: the association of a program with a cgroup, kept by a pin (kernel/bpf/cgroup.c)."""

import errno
import os
from pathlib import Path

from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.cgroups import AttachType
from sockhop.kernel.maps import open_pinned
from sockhop.kernel.syscall import KernelError, check

__all__ = ["attach", "detach", "linked_program"]


def attach(program: int, cgroup: int, attach_type: AttachType, pin: Path) -> None:
    """Make *program* run at *attach_type* of *cgroup*, for as long as *pin* exists.

    A pinned link is updated in place: at no moment does neither program run. A link whose
    cgroup is gone (ENOLINK) is replaced. On any error the link of before stays in force.
    """
    try:
        link = open_pinned(pin)
    except FileNotFoundError:
        _attach_anew(program, cgroup, attach_type, pin)
        return
    try:
        result = lib.bpf_link_update(link, program, ffi.NULL)
    finally:
        os.close(link)
    if result == -errno.ENOLINK:
        pin.unlink()
        _attach_anew(program, cgroup, attach_type, pin)
    else:
        check(result, f"updating the link {pin}")


def detach(pin: Path) -> bool:
    """End the association that *pin* keeps, and remove the pin; False if there is no such pin.

    Removing a pin alone detaches later, from a work queue, in no order with others. So detach
    first, which is synchronous: Linux kernel commit 73b11c2ab072 ("bpf: Add support for forced
    LINK_DETACH command") (in v5.9).
    """
    try:
        link = open_pinned(pin)
    except FileNotFoundError:
        return False
    try:
        lib.bpf_link_detach(link)  # where it fails, removing the pin still does it
    finally:
        os.close(link)
    pin.unlink()
    return True


def linked_program(pin: Path) -> int | None:
    """Return the id of the program that the pinned link runs; None without such a pin."""
    try:
        link = open_pinned(pin)
    except FileNotFoundError:
        return None
    try:
        info = ffi.new("struct bpf_link_info *")
        size = ffi.new("__u32 *", ffi.sizeof("struct bpf_link_info"))
        check(lib.bpf_obj_get_info_by_fd(link, info, size), f"reading the link {pin}")
        return int(info.prog_id)
    finally:
        os.close(link)


def _attach_anew(program: int, cgroup: int, attach_type: AttachType, pin: Path) -> None:
    link = lib.bpf_link_create(program, cgroup, attach_type, ffi.NULL)
    if link == -errno.EPERM:
        raise KernelError(
            f"attaching at {attach_type.hook}",
            errno.EPERM,
            hint="run as root with CAP_BPF and CAP_NET_ADMIN; or another tool has attached a "
            "program there without flags, which allows no second one "
            "(`bpftool cgroup show` names it)",
        )
    check(link, f"attaching at {attach_type.hook}")
    try:
        check(lib.bpf_obj_pin(link, str(pin).encode()), f"pinning the link {pin}")
    finally:
        os.close(link)
