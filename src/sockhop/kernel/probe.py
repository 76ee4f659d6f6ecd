"""Tries what the kernel can do: makes tiny maps and programs and closes them again at once.

Nothing is attached to a cgroup, nothing is pinned, and no answer comes from a version number.
"""

import errno
import os
import resource
import socket
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.cookies import socket_cookie
from sockhop.kernel.sockdiag import destroy_sockets

__all__ = ["Lack", "Prober", "call", "copy", "ldx", "leave", "mov", "op"]

_QUIET_FUNCTION = "bpf_fentry_test1"
"""Made for tests (net/bpf/test_run.c): nobody calls it, so tracing it disturbs nobody."""
_SK_OF_SOCK_ADDR = 64
"""Offset of `sk` in struct bpf_sock_addr (include/uapi/linux/bpf.h)."""
_TCP_ULP, _SOL_TLS, _TLS_TX = 31, 282, 1
_TLS_KEY = struct.pack("=HH", 0x0304, 51) + bytes(36)
"""struct tls12_crypto_info_aes_gcm_128, TLS 1.3 (include/uapi/linux/tls.h)."""
_ENOTSUPP = 524  # the kernel's own, not in libc


class Lack(Exception):
    """The kernel said no: `errno` is how (0 where no call was refused), `reason` is text."""

    def __init__(self, number: int, detail: str = "") -> None:
        self.errno = number
        name = "ENOTSUPP" if number == _ENOTSUPP else errno.errorcode.get(number, "")
        self.reason = ": ".join(filter(None, (name, detail))) or "no"
        super().__init__(self.reason)


# --- BPF instructions (Documentation/bpf/standardization/instruction-set.rst) -----------------


def op(code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    """Return one instruction."""
    return struct.pack("=BBhi", code, dst | src << 4, off, imm)


def mov(dst: int, value: int) -> bytes:
    """dst = value"""
    return op(0xB7, dst, imm=value)


def copy(dst: int, src: int) -> bytes:
    """dst = src"""
    return op(0xBF, dst, src)


def ldx(dst: int, src: int, off: int) -> bytes:
    """dst = *(u64 *)(src + off)"""
    return op(0x79, dst, src, off)


def call(helper: int) -> bytes:
    """Call a helper by its number."""
    return op(0x85, imm=helper)


def leave(value: int) -> bytes:
    """Return value"""
    return mov(0, value) + op(0x95)


def _load_map(dst: int, fd: int) -> bytes:
    return op(0x18, dst, 1, imm=fd) + op(0)


def _leave_if_null(register: int, value: int) -> bytes:
    return op(0x55, register, off=2) + leave(value)


class Prober:
    """What a run of probes shares. Use as a context manager; every probe raises Lack for no."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._storage: int | None = None
        self._hash: int | None = None
        self._vmlinux: Any = None

    def __enter__(self) -> "Prober":
        lib.sockhop_log_reset()  # libbpf prints nothing from here on
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # --- maps ---------------------------------------------------------------------------------

    def map(self, kind: int, key: int, value: int, *, entries: int = 1, btf: int = -1) -> int:
        """Make a map; return its descriptor, closed at the end of the run."""
        flags = lib.BPF_F_NO_PREALLOC if kind == lib.BPF_MAP_TYPE_SK_STORAGE else 0
        fd = lib.sockhop_probe_map(kind, key, value, entries, flags, btf)
        return self._keep(fd)

    def storage(self) -> int:
        """Return a socket storage map, the same one for the whole run."""
        if self._storage is None:
            btf = self._keep(lib.bpf_btf_load(_INT_BTF, len(_INT_BTF), ffi.NULL))
            self._storage = self.map(lib.BPF_MAP_TYPE_SK_STORAGE, 4, 4, entries=0, btf=btf)
        return self._storage

    def sockhash(self) -> int:
        """Return a sockhash, the same one for the whole run."""
        if self._hash is None:
            self._hash = self.map(lib.BPF_MAP_TYPE_SOCKHASH, 8, 4)
        return self._hash

    def batch(self) -> None:
        """Write and read entries of a hash in batches."""
        fd = self.map(lib.BPF_MAP_TYPE_HASH, 4, 4, entries=4)
        count = ffi.new("__u32 *", 2)
        data = struct.pack("=II", 1, 2)
        self._check(lib.bpf_map_update_batch(fd, data, data, count, ffi.NULL))
        count[0] = 4
        room = [ffi.new("char[16]") for _ in range(3)]
        result = lib.bpf_map_lookup_batch(fd, ffi.NULL, *room, count, ffi.NULL)
        if result not in (0, -errno.ENOENT) or count[0] != 2:
            raise Lack(-result)

    # --- programs -----------------------------------------------------------------------------

    def program(self, kind: int, attach: int, code: bytes, *, btf_id: int = 0) -> int:
        """Load a program; return its descriptor, closed at the end of the run."""
        log = ffi.new("char[]", 1 << 14)
        fd = lib.sockhop_probe_program(kind, attach, btf_id, code, len(code) // 8, log, len(log))
        if fd < 0:
            raise Lack(-fd, _complaint(ffi.string(log).decode(errors="replace")))
        return self._keep(fd)

    def jit(self) -> None:
        """Load a program and see whether it has machine code."""
        fd = self.program(lib.BPF_PROG_TYPE_SOCK_OPS, lib.BPF_CGROUP_SOCK_OPS, leave(1))
        if self._check(lib.sockhop_jited_size(fd)) == 0:
            raise Lack(0, "programs are interpreted (net.core.bpf_jit_enable)")

    def hook(self, attach: int, code: bytes = b"") -> int:
        """Load a program for a cgroup hook that runs *code* (r1 is the context) and allows."""
        kind = (
            lib.BPF_PROG_TYPE_CGROUP_SOCK
            if attach in _SOCK_HOOKS
            else lib.BPF_PROG_TYPE_CGROUP_SOCK_ADDR
        )
        return self.program(kind, attach, code + leave(1))

    def storage_in_connect(self) -> None:
        """Ask for the socket's element in a connect hook."""
        socket_pointer = ldx(2, 1, _SK_OF_SOCK_ADDR) + _leave_if_null(2, 1)
        code = socket_pointer + _load_map(1, self.storage()) + mov(3, 0) + mov(4, 1)
        self.hook(lib.BPF_CGROUP_INET4_CONNECT, code + call(lib.BPF_FUNC_sk_storage_get))

    def storage_in_release(self) -> None:
        """Ask for the socket's element when it is closed."""
        code = copy(2, 1) + _load_map(1, self.storage()) + mov(3, 0) + mov(4, 0)
        self.hook(lib.BPF_CGROUP_INET_SOCK_RELEASE, code + call(lib.BPF_FUNC_sk_storage_get))

    def storage_in_iterator(self) -> None:
        """Ask for the element of each UDP socket that an iterator meets. It never runs."""
        # ctx->udp_sk stands behind ctx->meta.
        socket_pointer = ldx(2, 1, 8) + _leave_if_null(2, 0)
        code = socket_pointer + _load_map(1, self.storage()) + mov(3, 0) + mov(4, 0)
        self.iterator("udp", code + call(lib.BPF_FUNC_sk_storage_get))

    def socket_of_file(self) -> None:
        """Ask for the socket of each file that an iterator meets. It never runs."""
        # ctx->file stands behind ctx->meta, ctx->task and ctx->fd.
        code = ldx(1, 1, 24) + _leave_if_null(1, 0)
        self.iterator("task_file", code + call(lib.BPF_FUNC_sock_from_file))

    def sk_msg(self) -> None:
        """Load a program that redirects a message through a sockhash."""
        self.program(
            lib.BPF_PROG_TYPE_SK_MSG,
            lib.BPF_SK_MSG_VERDICT,
            self._with_key() + call(lib.BPF_FUNC_msg_redirect_hash) + leave(1),
        )

    def sock_ops(self) -> None:
        """Load a program that puts a socket into a sockhash."""
        self.program(
            lib.BPF_PROG_TYPE_SOCK_OPS,
            lib.BPF_CGROUP_SOCK_OPS,
            self._with_key() + call(lib.BPF_FUNC_sock_hash_update) + leave(1),
        )

    def cookie_in_sock_ops(self) -> None:
        """Ask for the cookie of a network namespace in a sock_ops program."""
        code = call(lib.BPF_FUNC_get_netns_cookie) + leave(1)
        self.program(lib.BPF_PROG_TYPE_SOCK_OPS, lib.BPF_CGROUP_SOCK_OPS, code)

    def _with_key(self) -> bytes:
        # r1 context, r2 map, r3 pointer to a key of 0 on the stack, r4 flags
        key = op(0x7A, 10, off=-8) + copy(3, 10) + op(0x07, 3, imm=-8)
        return _load_map(2, self.sockhash()) + key + mov(4, 0)

    # --- links --------------------------------------------------------------------------------

    def link_create(self) -> None:
        """Ask for a link on no cgroup: EBADF from a kernel that would make one."""
        program = self.hook(lib.BPF_CGROUP_INET4_CONNECT)
        self._expect(
            errno.EBADF, lib.bpf_link_create(program, -1, lib.BPF_CGROUP_INET4_CONNECT, ffi.NULL)
        )

    def link_update(self) -> None:
        """Ask to update no link: EBADF from a kernel that would."""
        program = self.hook(lib.BPF_CGROUP_INET4_CONNECT)
        self._expect(errno.EBADF, lib.bpf_link_update(-1, program, ffi.NULL))

    def link_detach(self) -> None:
        """Ask to detach no link: EBADF from a kernel that would."""
        self._expect(errno.EBADF, lib.bpf_link_detach(-1))

    # --- tracing ------------------------------------------------------------------------------

    def btf_id(self, name: str, kind: int) -> int:
        """Return the id of a type in the kernel's own BTF."""
        if self._vmlinux is None:
            found = lib.btf__load_vmlinux_btf()
            if found == ffi.NULL:
                raise Lack(ffi.errno, "no /sys/kernel/btf/vmlinux")
            self._vmlinux = found
            self._stack.callback(lib.btf__free, found)
        number = int(lib.btf__find_by_name_kind(self._vmlinux, name.encode(), kind))
        if number < 0:
            raise Lack(-number, f"{name} is not in the kernel's BTF")
        return number

    def iterator(self, name: str, code: bytes = b"") -> None:
        """Load a program for iter/*name* that runs *code* first."""
        number = self.btf_id(f"bpf_iter_{name}", lib.BTF_KIND_FUNC)
        self.program(lib.BPF_PROG_TYPE_TRACING, lib.BPF_TRACE_ITER, code + leave(0), btf_id=number)

    def kfunc(self, name: str) -> None:
        """Look for a function that programs may call."""
        self.btf_id(name, lib.BTF_KIND_FUNC)

    def sock_destroy(self) -> None:
        """Load an iterator that would destroy the sockets that it meets. It never runs."""
        number = self.btf_id("bpf_sock_destroy", lib.BTF_KIND_FUNC)
        # ctx->sk_common stands behind ctx->meta; src 2 means BPF_PSEUDO_KFUNC_CALL.
        self.iterator("tcp", ldx(1, 1, 8) + _leave_if_null(1, 0) + op(0x85, src=2, imm=number))

    def tp_btf(self) -> None:
        """Load a program for the tracepoint inet_sock_set_state."""
        number = self.btf_id("btf_trace_inet_sock_set_state", lib.BTF_KIND_TYPEDEF)
        kind = lib.BPF_PROG_TYPE_TRACING
        self.program(kind, lib.BPF_TRACE_RAW_TP, leave(0), btf_id=number)

    def fentry(self) -> None:
        """Attach a program to a function that nobody calls."""
        number = self.btf_id(_QUIET_FUNCTION, lib.BTF_KIND_FUNC)
        kind = lib.BPF_PROG_TYPE_TRACING
        program = self.program(kind, lib.BPF_TRACE_FENTRY, leave(0), btf_id=number)
        os.close(self._check(lib.bpf_raw_tracepoint_open(ffi.NULL, program)))

    def kprobe(self) -> None:
        """Load a program, and open a disabled kprobe on a function that nobody calls."""
        self.program(lib.BPF_PROG_TYPE_KPROBE, 0, leave(0))
        try:
            unit = Path("/sys/bus/event_source/devices/kprobe/type").read_text()
        except OSError as error:
            raise Lack(error.errno or 0, "the kernel has no kprobe events") from None
        function = ffi.new("char[]", _QUIET_FUNCTION.encode())
        os.close(self._check(lib.sockhop_probe_kprobe(int(unit), function)))

    # --- the rest -----------------------------------------------------------------------------

    def grace_period(self) -> None:
        """Wait for a grace period."""
        self._check(lib.sockhop_grace_period())

    def destroy_socket(self, kind: int) -> None:
        """Destroy a socket of our own on the loopback address, named by its cookie.

        A socket that does not exist would not do: ENOENT is also the answer of a kernel that
        has no diagnosis for the protocol (net/ipv4/inet_diag.c).
        """
        try:
            with socket.socket(socket.AF_INET, kind, _PROTOCOLS[kind][1]) as own:
                own.bind(("127.0.0.1", 0))
                if kind == socket.SOCK_STREAM:
                    own.listen(1)
                (number,) = destroy_sockets([_identity(kind, own)])
        except OSError as error:
            raise Lack(error.errno or 0, "making a socket on 127.0.0.1") from None
        if number:
            raise Lack(number)

    def ktls_beside_sockmap(self) -> None:
        """Give a TLS key to a socket on 127.0.0.1 that a sockhash holds."""
        try:
            with (
                socket.create_server(("127.0.0.1", 0)) as listener,
                socket.create_connection(listener.getsockname(), 1) as own,
            ):
                held = struct.pack("=I", own.fileno())
                self._check(lib.bpf_map_update_elem(self.sockhash(), bytes(8), held, 0))
                own.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
                own.setsockopt(_SOL_TLS, _TLS_TX, _TLS_KEY)
        except OSError as error:
            number = error.errno or 0
            raise Lack(number, "no kTLS" if number == errno.ENOENT else "") from None

    def _keep(self, fd: int) -> int:
        self._stack.callback(os.close, self._check(fd))
        return fd

    @staticmethod
    def _check(result: int) -> int:
        if result < 0:
            raise Lack(-result)
        return result

    @staticmethod
    def _expect(number: int, result: int) -> None:
        if result != -number:
            raise Lack(-result)


def memlock_is_charged() -> bool:
    """Whether BPF memory counts against RLIMIT_MEMLOCK: true when a map fails without any.

    Memory cgroups took that over: Linux kernel commit 80ee81e0403c ("bpf: Eliminate rlimit-based
    memory accounting infra for bpf maps") (in v5.11).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, hard))
    try:
        fd = int(lib.sockhop_probe_memlock())
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    if fd >= 0:
        os.close(fd)
    return fd < 0


_SOCK_HOOKS = (
    lib.BPF_CGROUP_INET4_POST_BIND,
    lib.BPF_CGROUP_INET6_POST_BIND,
    lib.BPF_CGROUP_INET_SOCK_RELEASE,
)

_NAMES = b"\0int\0"
_INT_BTF = (
    struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 16, 16, len(_NAMES))
    + struct.pack("=IIII", 1, lib.BTF_KIND_INT << 24, 4, lib.BTF_INT_SIGNED << 24 | 32)
    + _NAMES
)
"""BTF (Documentation/bpf/btf.rst) with `int` as its only type."""


def _complaint(log: str) -> str:
    """Return the line of a verifier log that says what is wrong."""
    lines = [line for line in log.splitlines() if line and not line.startswith("processed ")]
    return lines[-1] if lines else ""


class _Identity(NamedTuple):
    """See :class:`sockhop.kernel.sockdiag.Identity`."""

    protocol: int
    family: int
    local_address: bytes
    local_port: int
    remote_address: bytes
    remote_port: int
    interface: int
    cookie: int


def _identity(kind: int, own: socket.socket) -> _Identity:
    diagnosis, protocol = _PROTOCOLS[kind]
    cookie = socket_cookie(own)
    here = bytes(10) + b"\xff\xff" + socket.inet_aton("127.0.0.1")
    port = protocol or own.getsockname()[1]  # that of a raw socket is its protocol
    return _Identity(diagnosis, socket.AF_INET, here, port, bytes(16), 0, 0, cookie)


# What sock_diag(7) calls it, and the protocol of a socket to try it with: 253 is for experiments.
_PROTOCOLS: dict[int, tuple[int, int]] = {
    socket.SOCK_STREAM: (socket.IPPROTO_TCP, 0),
    socket.SOCK_DGRAM: (socket.IPPROTO_UDP, 0),
    socket.SOCK_RAW: (socket.IPPROTO_RAW, 253),
}
