"""What sockhop uses of the kernel: what for, without it what, since when, and how it is tried."""

import errno
import os
import socket
from collections.abc import Callable
from typing import NamedTuple

from sockhop.kernel._libbpf import lib
from sockhop.kernel.cgroups import AttachType
from sockhop.kernel.netns import cookie_by_option
from sockhop.kernel.probe import Lack, Prober, call, leave, mov, op
from sockhop.kernel.procfs import Holder, borrowed
from sockhop.kernel.syscall import KernelError

__all__ = ["BPFFS", "CGROUP2", "PROBES", "Probe"]

Attempt = Callable[[Prober], object]


class _Since(NamedTuple):
    """The first Linux that has a feature, and the commit that it came with where that is sure."""

    version: str
    commit: str = ""
    subject: str = ""

    def __str__(self) -> str:
        if not self.commit:
            return f"Linux v{self.version}"
        return f'Linux kernel commit {self.commit} ("{self.subject}") (in v{self.version})'


class Probe(NamedTuple):
    """A feature, and the attempt that raises Lack where the kernel does not have it."""

    name: str
    used_for: str
    without: str
    since: _Since
    attempt: Attempt

    @property
    def required(self) -> bool:
        """Whether nothing can be balanced without it."""
        return self.without == _NO_BALANCING


def _own_descriptor(_: Prober) -> None:
    with socket.socket(socket.AF_UNIX) as own:
        try:
            with borrowed(Holder("sockhop", os.getpid(), own.fileno())):
                pass
        except KernelError as error:
            raise Lack(error.errno) from None


def _netns_cookie(_: Prober) -> None:
    with socket.socket(socket.AF_UNIX) as own:
        if cookie_by_option(own) is None:
            raise Lack(errno.ENOPROTOOPT)


_NO_BALANCING = "nothing can be balanced"
_EHOSTUNREACH = 113


def _connect(code: bytes) -> Attempt:
    return lambda prober: prober.hook(AttachType.CONNECT4, code)


def _map(kind: int, key: int, value: int, entries: int) -> Attempt:
    return lambda prober: prober.map(kind, key, value, entries=entries)


def _iterator(name: str) -> Attempt:
    return lambda prober: prober.iterator(name)


def _hooks(names: str, used_for: str, without: str, since: _Since) -> tuple[Probe, ...]:
    def attempt(name: str) -> Attempt:
        return lambda prober: prober.hook(AttachType[name.upper()])

    return tuple(
        Probe(f"hook {name}", used_for, without, since, attempt(name)) for name in names.split()
    )


CGROUP2 = (
    "cgroup2",
    "choosing whose sockets are balanced",
    _NO_BALANCING,
    _Since("4.5", "67e9c74b8a87", "cgroup: replace __DEVEL__sane_behavior with cgroup2 fs type"),
)
BPFFS = (
    "bpffs",
    "balancing on when the agent stops",
    _NO_BALANCING,
    _Since("4.4", "b2197755b263", "bpf: add support for persistent maps/progs"),
)

PROBES = (
    Probe(
        "bpf(2)",
        "everything",
        _NO_BALANCING,
        _Since("3.18", "99c55f7d47c0", "bpf: introduce BPF syscall and maps"),
        _map(lib.BPF_MAP_TYPE_ARRAY, 4, 8, 1),
    ),
    Probe(
        "kernel BTF",
        "programs that fit this kernel's structs",
        _NO_BALANCING,
        _Since("5.4", "341dfcf8d78e", "btf: expose BTF info through sysfs"),
        lambda prober: prober.btf_id("tcp_sock", lib.BTF_KIND_STRUCT),
    ),
    Probe(
        "JIT",
        "speed",
        "hooks are interpreted: each connect takes longer",
        _Since("3.16", "622582786c9e", "net: filter: x86: internal BPF JIT"),
        lambda prober: prober.jit(),
    ),
    Probe(
        "32-bit jumps",
        "programs as they are compiled",
        _NO_BALANCING,
        _Since("5.1", "092ed0968bb6", "bpf: verifier support JMP32"),
        # if w1 == 0 goto +2
        _connect(mov(1, 0) + op(0x16, 1, off=2) + leave(1)),
    ),
    Probe(
        "bounded loops",
        "reading again while a service changes",
        _NO_BALANCING,
        _Since("5.3", "2589726d12a1", "bpf: introduce bounded loops"),
        # r1 += 1; if r1 < 4 goto -2
        _connect(mov(1, 0) + op(0x07, 1, imm=1) + op(0xA5, 1, off=-2, imm=4)),
    ),
    *_hooks(
        "connect4 connect6",
        "choosing a backend, TCP and connected UDP",
        _NO_BALANCING,
        _Since("4.17", "d74bad4e74ee", "bpf: Hooks for sys_connect"),
    ),
    *_hooks(
        "getpeername4 getpeername6",
        "showing programs the frontend that they dialled",
        _NO_BALANCING,
        _Since("5.8", "1b66d253610c", "bpf: Add get{peer, sock}name attach types for sock_addr"),
    ),
    *_hooks(
        "sock_release",
        "counting live sockets",
        _NO_BALANCING,
        _Since("5.9", "f5836749c9c0", "bpf: Add BPF_CGROUP_INET_SOCK_RELEASE hook"),
    ),
    *_hooks(
        "sendmsg4 sendmsg6",
        "choosing a backend for unconnected UDP",
        _NO_BALANCING,
        _Since("4.18", "1cedee13d25a", "bpf: Hooks for sys_sendmsg"),
    ),
    *_hooks(
        "recvmsg4 recvmsg6",
        "answers on unconnected UDP that come from the frontend",
        _NO_BALANCING,
        _Since("5.2", "983695fa6765", "bpf: fix unconnected udp hooks"),
    ),
    *_hooks(
        "bind4 bind6",
        "keeping programs off a service's address and port",
        _NO_BALANCING,
        _Since("4.17", "4fbac77d2d09", "bpf: Hooks for sys_bind"),
    ),
    *_hooks(
        "post_bind4 post_bind6",
        "keeping programs off service ports that the kernel gave them",
        _NO_BALANCING,
        _Since("4.17", "aac3fc320d94", "bpf: Post-hooks for sys_bind"),
    ),
    Probe(
        "cgroup link",
        "attaching beside other tools, for as long as a pin exists",
        _NO_BALANCING,
        _Since(
            "5.7", "af6eea57437a", "bpf: Implement bpf_link-based cgroup BPF program attachment"
        ),
        lambda prober: prober.link_create(),
    ),
    Probe(
        "link update",
        "upgrades without a gap",
        _NO_BALANCING,
        _Since(
            "5.7",
            "0c991ebc8c69",
            "bpf: Implement bpf_prog replacement for an active bpf_cgroup_link",
        ),
        lambda prober: prober.link_update(),
    ),
    Probe(
        "link detach",
        "ending balancing in order, at once",
        "`detach` takes effect a moment later, in no order of hooks",
        _Since("5.9", "73b11c2ab072", "bpf: Add support for forced LINK_DETACH command"),
        lambda prober: prober.link_detach(),
    ),
    Probe(
        "sk_storage",
        "provenance that lives as long as its socket",
        _NO_BALANCING,
        _Since("5.2", "6ac99e8f23d4", "bpf: Introduce bpf sk local storage"),
        lambda prober: prober.storage(),
    ),
    Probe(
        "sk_storage in connect hooks",
        "writing provenance",
        _NO_BALANCING,
        _Since(
            "5.3",
            "fb85c4a730af",
            "bpf: export bpf_sock for BPF_PROG_TYPE_CGROUP_SOCK_ADDR prog type",
        ),
        lambda prober: prober.storage_in_connect(),
    ),
    Probe(
        "sk_storage in sock_release",
        "counting live sockets",
        _NO_BALANCING,
        _Since("5.9", "f7c6cb1d9728", "bpf: Expose socket storage to BPF_PROG_TYPE_CGROUP_SOCK"),
        lambda prober: prober.storage_in_release(),
    ),
    Probe(
        "socket cookie in connect hooks",
        "naming sockets",
        _NO_BALANCING,
        _Since("4.19", "d692f1138a4b", "bpf: Support bpf_get_socket_cookie in more prog types"),
        _connect(call(lib.BPF_FUNC_get_socket_cookie)),
    ),
    Probe(
        "netns cookie in connect hooks",
        "services of one network namespace, loopback among them",
        _NO_BALANCING,
        _Since("5.7", "f318903c0bf4", "bpf: Add netns cookie and enable it for bpf cgroup hooks"),
        _connect(call(lib.BPF_FUNC_get_netns_cookie)),
    ),
    Probe(
        "SO_NETNS_COOKIE",
        "the agent's side of that",
        "a program on the own cgroup's sock_create hook tells it, an instant each time",
        _Since("5.14", "e8b9eab99232", "net: retrieve netns cookie via getsocketopt"),
        _netns_cookie,
    ),
    Probe(
        "atomic exchange",
        "uncounting each socket once",
        "a map decides who uncounts a socket; nothing is spliced",
        _Since("5.12", "5ffa25502b5a", "bpf: Add instructions for atomic_[cmp]xchg"),
        # *(u64 *)(fp - 8) = 0; r1 = xchg(fp - 8, r1)
        _connect(mov(1, 0) + op(0x7A, 10, off=-8) + op(0xDB, 10, 1, off=-8, imm=0xE1)),
    ),
    Probe(
        "bpf_ktime_get_boot_ns",
        "the time of each connect",
        _NO_BALANCING,
        _Since("5.8", "71d19214776e", "bpf: add bpf_ktime_get_boot_ns()"),
        _connect(call(lib.BPF_FUNC_ktime_get_boot_ns)),
    ),
    Probe(
        "bpf_set_retval",
        "EHOSTUNREACH where no backend serves",
        "connects without a backend fail with EPERM instead of EHOSTUNREACH",
        _Since(
            "5.18",
            "b44123b4a3dc",
            "bpf: Add cgroup helpers bpf_{get,set}_retval to get/set syscall return value",
        ),
        _connect(mov(1, -_EHOSTUNREACH) + call(lib.BPF_FUNC_set_retval)),
    ),
    Probe(
        "LRU hash",
        "provenance where a socket's storage is refused",
        _NO_BALANCING,
        _Since("4.10", "29ba732acbee", "bpf: Add BPF_MAP_TYPE_LRU_HASH"),
        _map(lib.BPF_MAP_TYPE_LRU_HASH, 8, 8, 1),
    ),
    Probe(
        "batch operations",
        "writing and reading many entries at once",
        "entries are written and read one by one",
        _Since("5.6", "057996380a42", "bpf: Add batch ops to all htab bpf map"),
        lambda prober: prober.batch(),
    ),
    Probe(
        "grace period",
        "waiting until no hook uses what is about to be deleted",
        _NO_BALANCING,
        _Since(
            "4.20",
            "1ae80cf31938",
            "bpf: wait for running BPF programs when updating map-in-map",
        ),
        lambda prober: prober.grace_period(),
    ),
    Probe(
        "iter/bpf_sk_storage_map",
        "listing balanced sockets of all namespaces",
        "`get sockets` and the count in `detach` fail",
        _Since("5.9", "5ce6e77c7edf", "bpf: Implement bpf iterator for sock local storage map"),
        _iterator("bpf_sk_storage_map"),
    ),
    Probe(
        "iter/task_file",
        "moving UDP sockets: finding the processes that have them, in one pass",
        "processes are found through /proc, which takes longer",
        _Since("5.8", "eaaacd23910f", "bpf: Add task and task/file iterator targets"),
        _iterator("task_file"),
    ),
    Probe(
        "bpf_sock_from_file",
        "that, too",
        "processes are found through /proc, which takes longer",
        _Since("5.11", "4f19cab76136", "bpf: Add a bpf_sock_from_file helper"),
        lambda prober: prober.socket_of_file(),
    ),
    Probe(
        "pidfd_getfd(2)",
        "moving UDP sockets to another backend",
        "no socket is moved: it is severed instead",
        _Since("5.6", "8649c322f75c", "pid: Implement pidfd_getfd syscall"),
        _own_descriptor,
    ),
    Probe(
        "bpf_rdonly_cast",
        "telling sockets apart by cgroup: clients.cgroups, clients.exclude, policies",
        "a service that names cgroups, and such policies, are refused",
        _Since("6.2", "a35b9af4ec2c", "bpf: Add a kfunc for generic type cast"),
        lambda prober: prober.kfunc("bpf_rdonly_cast"),
    ),
    Probe(
        "iter/tcp",
        "ending TCP sockets of backends that are gone, in one pass",
        "SOCK_DESTROY ends them, one message a socket",
        _Since("5.9", "52d87d5f6418", "net: bpf: Implement bpf iterator for tcp"),
        _iterator("tcp"),
    ),
    Probe(
        "iter/udp",
        "ending UDP sockets of backends that are gone, in one pass",
        "SOCK_DESTROY ends them, one message a socket",
        _Since("5.9", "5788b3a07fc5", "net: bpf: Implement bpf iterator for udp"),
        _iterator("udp"),
    ),
    Probe(
        "sk_storage in iterators",
        "ending sockets from an iterator; taking sockets out that are done with splicing",
        "SOCK_DESTROY ends them, one message a socket; nothing is spliced",
        _Since("5.11", "a50a85e40c59", "bpf: Expose bpf_sk_storage_* to iterator programs"),
        lambda prober: prober.storage_in_iterator(),
    ),
    Probe(
        "bpf_sock_destroy",
        "ending sockets from an iterator",
        "SOCK_DESTROY ends them, one message a socket",
        _Since("6.5", "4ddbcb886268", "bpf: Add bpf_sock_destroy kfunc"),
        lambda prober: prober.sock_destroy(),
    ),
    Probe(
        "SOCK_DESTROY for TCP",
        "ending TCP sockets where iterators cannot",
        "without bpf_sock_destroy, none can be ended from outside",
        _Since("4.5", "c1e64e298b8c", "net: diag: Support destroying TCP sockets."),
        lambda prober: prober.destroy_socket(socket.SOCK_STREAM),
    ),
    Probe(
        "SOCK_DESTROY for UDP",
        "ending connected UDP sockets where iterators cannot",
        "without bpf_sock_destroy, none can be ended from outside",
        _Since("4.9", "5d77dca82839", "net: diag: support SOCK_DESTROY for UDP sockets"),
        lambda prober: prober.destroy_socket(socket.SOCK_DGRAM),
    ),
    Probe(
        "SOCK_DESTROY for raw",
        "ending raw sockets by hand",
        "none can be listed or ended",
        _Since("4.10", "432490f9d455", "net: ip, diag -- Add diag interface for raw sockets"),
        lambda prober: prober.destroy_socket(socket.SOCK_RAW),
    ),
    Probe(
        "sockhash",
        "splicing",
        "nothing is spliced",
        _Since("4.18", "81110384441a", "bpf: sockmap, add hash map support"),
        lambda prober: prober.sockhash(),
    ),
    Probe(
        "sk_msg",
        "splicing",
        "nothing is spliced",
        _Since(
            "4.17",
            "4f738adba30a",
            "bpf: create tcp_bpf_ulp allowing BPF to monitor socket TX/RX data",
        ),
        lambda prober: prober.sk_msg(),
    ),
    Probe(
        "sock_ops",
        "splicing: finding the two ends of a connection",
        "nothing is spliced",
        _Since("4.13", "40304b2a1567", "bpf: BPF support for sock_ops"),
        lambda prober: prober.sock_ops(),
    ),
    Probe(
        "netns cookie in sock_ops",
        "splicing: who is opted in",
        "nothing is spliced",
        _Since("5.15"),
        lambda prober: prober.cookie_in_sock_ops(),
    ),
    Probe(
        "kTLS beside a sockmap",
        "splicing: programs that set up kTLS",
        "setsockopt(TLS_TX) on a spliced socket fails: OpenSSL then encrypts by itself",
        _Since("4.20", "d3b18ad31f93", "tls: add bpf support to sk_msg handling"),
        lambda prober: prober.ktls_beside_sockmap(),
    ),
    Probe(
        "ring buffer",
        "later: events from the kernel",
        "events are seen by polling counters",
        _Since("5.8", "457f44363a88", "bpf: Implement BPF ring buffer and verifier support for it"),
        _map(lib.BPF_MAP_TYPE_RINGBUF, 0, 0, 1 << 16),
    ),
    Probe(
        "tp_btf",
        "later: tracepoints with less cost than raw ones",
        "raw tracepoints do the same, and are what is used",
        _Since("5.5", "f1b9509c2fb0", "bpf: Replace prog_raw_tp+btf_id with prog_tracing"),
        lambda prober: prober.tp_btf(),
    ),
    Probe(
        "fentry",
        "later: call paths with less cost than by kprobes",
        "kprobes trace functions, where there are any",
        _Since("5.5", "fec56f5890d9", "bpf: Introduce BPF trampoline"),
        lambda prober: prober.fentry(),
    ),
    Probe(
        "kprobe",
        "`trace path`: which kernel functions run for a request",
        "tracepoints tell less: a socket's handlers, not what is called",
        _Since("4.1", "2541517c32be", "tracing, perf: Implement BPF programs attached to kprobes"),
        lambda prober: prober.kprobe(),
    ),
)
