"""Network namespaces: cookies, and entering one by path (net/core/net_namespace.c)."""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sockhop.errors import InputError
from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.cgroups import AttachType, open_cgroup, own_cgroup
from sockhop.kernel.cookies import socket_cookie
from sockhop.kernel.objects import BpfObject, object_path
from sockhop.kernel.syscall import KernelError, check

__all__ = [
    "cookie_by_hook",
    "cookie_by_option",
    "current_cookie",
    "entered",
    "inode",
    "netns_of",
    "socket_netns_cookie",
]

# Linux kernel commit e8b9eab99232 ("net: retrieve netns cookie via getsocketopt") (in v5.14).
_SO_NETNS_COOKIE = 71
_SIOCGSKNS = 0x894C
_SELF = Path("/proc/thread-self/ns/net")


def current_cookie() -> int:
    """Return the cookie of this thread's network namespace, never given twice until reboot."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = cookie_by_option(probe)
    return cookie_by_hook() if found is None else found


def socket_netns_cookie(own: socket.socket) -> int:
    """Return the cookie of the network namespace of a socket."""
    found = cookie_by_option(own)
    if found is not None:
        return found
    with netns_of(own) as path, entered(path):
        return cookie_by_hook()


def cookie_by_option(own: socket.socket) -> int | None:
    """Return the cookie of a socket's network namespace; None before Linux 5.14."""
    try:
        data = own.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return None
        raise KernelError("reading SO_NETNS_COOKIE", error.errno or 0) from None
    return int(struct.unpack("=Q", data)[0])


def cookie_by_hook() -> int:
    """Return the cookie of this thread's network namespace as a program for a cgroup sees it.

    For kernels before 5.14: a program that only notes it is attached, for an instant, to this
    process' own cgroup. It joins those of others; KernelError where one of them admits no other.
    """
    with BpfObject(object_path("netns")) as programs, open_cgroup(own_cgroup()) as cgroup:
        hook = AttachType.SOCK_CREATE
        link = check(
            lib.bpf_link_create(programs.program("sockhop_cookie"), cgroup, hook, ffi.NULL),
            "attaching to sock_create of the own cgroup, to read the cookie of a namespace",
        )
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
                name = ffi.new("__u64 *", socket_cookie(made))
        finally:
            lib.bpf_link_detach(link)  # where it fails, closing the descriptor does it
            os.close(link)
        value = ffi.new("__u64 *")
        found = lib.bpf_map_lookup_elem(programs.map_fd("cookies"), name, value)
        check(found, "reading the cookie of a network namespace")
        return int(value[0])


def inode(path: Path = _SELF) -> int:
    """Return the inode number by which /proc and lsns name the namespace at *path*."""
    return path.stat().st_ino


@contextmanager
def netns_of(own: socket.socket) -> Iterator[Path]:
    """Yield a path of the network namespace of a socket, which may be no process's.

    Linux kernel commit c62cce2caee5 ("net: add an ioctl to get a socket network namespace")
    (in v4.10). KernelError with EPERM without CAP_NET_ADMIN there.
    """
    try:
        fd = fcntl.ioctl(own.fileno(), _SIOCGSKNS)
    except OSError as error:
        raise KernelError("asking for a socket's network namespace", error.errno or 0) from None
    try:
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


@contextmanager
def entered(path: Path) -> Iterator[None]:
    """Run the body in the network namespace at *path*: this thread only (setns(2)).

    Where that is the one that it is in already, no right is needed.
    """
    with _opened(_SELF) as before, _opened(path) as target:
        if os.path.sameopenfile(before, target):
            yield
            return
        _setns(target, str(path))
        try:
            yield
        finally:
            _setns(before, "the namespace of before")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _setns(fd: int, name: str) -> None:
    if lib.setns(fd, lib.CLONE_NEWNET) < 0:
        if ffi.errno == errno.EINVAL:  # also where `ip netns` is just making or deleting one
            raise InputError(f"{name}: this is no network namespace")
        raise KernelError(f"entering {name}", ffi.errno)
