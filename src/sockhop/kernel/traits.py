"""What two kernels may differ in beside what they can do: settings, build options, structures.

Each with what it matters for. Read here, compared by :mod:`sockhop.diagnose.nodes`.
"""

import gzip
import os
import re
from contextlib import suppress
from pathlib import Path

from sockhop.errors import InputError
from sockhop.kernel.btf_file import BtfFile

__all__ = [
    "FUNCTIONS",
    "OPTIONS",
    "STRUCTS",
    "SYSCTLS",
    "Structs",
    "configuration",
    "own_types",
    "parse_options",
    "read_functions",
    "read_options",
    "read_structs",
    "read_sysctls",
]

Structs = dict[str, dict[str, str]]
"""C types of members, by struct and member."""

SYSCTLS = {
    "kernel.kptr_restrict": "names of kernel functions in traces",
    "kernel.perf_event_paranoid": "kprobes for call paths",
    "kernel.unprivileged_bpf_disabled": "who may load programs",
    "kernel.yama.ptrace_scope": "reaching sockets of other processes, to move them",
    "fs.inotify.max_user_watches": "following manifests",
    "fs.nr_open": "descriptors that the agent may have",
    "net.core.bpf_jit_enable": "speed of all hooks",
    "net.core.bpf_jit_harden": "speed of all hooks",
    "net.core.bpf_jit_limit": "room for programs",
    "net.core.optmem_max": "socket storage: provenance",
    "net.core.rmem_default": "how much may be spliced without an answer",
    "net.core.somaxconn": "connections that wait for accept()",
    "net.core.wmem_default": "send buffers",
    "net.ipv4.conf.all.rp_filter": "whether packets that come another way are dropped",
    "net.ipv4.conf.all.route_localnet": "127.0.0.0/8 from other namespaces",
    "net.ipv4.ip_forward": "reaching pods on this node",
    "net.ipv4.ip_local_port_range": "how many connections a client can have to one backend",
    "net.ipv4.ip_nonlocal_bind": "who may listen on addresses of services",
    "net.ipv4.tcp_abort_on_overflow": "what a full accept queue looks like to a client",
    "net.ipv4.tcp_congestion_control": "speed of TCP",
    "net.ipv4.tcp_fastopen": "bytes that come before splicing can begin",
    "net.ipv4.tcp_fin_timeout": "how long a closed connection stays",
    "net.ipv4.tcp_keepalive_time": "when a dead peer is noticed",
    "net.ipv4.tcp_max_syn_backlog": "connections that are being made",
    "net.ipv4.tcp_mtu_probing": "getting through an MTU black hole",
    "net.ipv4.tcp_retries2": "when a dead peer is given up",
    "net.ipv4.tcp_rmem": "receive buffers; how much may be spliced without an answer",
    "net.ipv4.tcp_syncookies": "what a full SYN queue looks like to a client",
    "net.ipv4.tcp_tw_reuse": "how soon a client's port is used again, and meets a stale entry",
    "net.ipv4.tcp_wmem": "send buffers",
    "net.ipv6.bindv6only": "whether IPv6 listeners take IPv4",
    "net.ipv6.conf.all.disable_ipv6": "IPv6 services",
    "net.ipv6.conf.all.forwarding": "reaching pods on this node",
    "net.mptcp.enabled": "sockets that balancing sees as MPTCP",
    "net.netfilter.nf_conntrack_max": "connections dropped by connection tracking",
}

OPTIONS = {
    "BPF_EVENTS": "kprobes and tracepoints",
    "BPF_JIT": "speed of all hooks",
    "BPF_JIT_ALWAYS_ON": "speed of all hooks",
    "BPF_STREAM_PARSER": "sockmaps: splicing, and Cilium's and Envoy's",
    "BPF_SYSCALL": "everything",
    "BPF_UNPRIV_DEFAULT_OFF": "who may load programs",
    "CGROUP_BPF": "balancing",
    "DEBUG_INFO_BTF": "programs that fit this kernel's structs",
    "DEBUG_INFO_BTF_MODULES": "types of modules",
    "DYNAMIC_FTRACE_WITH_DIRECT_CALLS": "fentry: call paths",
    "FPROBE": "call paths",
    "FUNCTION_ERROR_INJECTION": "tracing",
    "FUNCTION_GRAPH_TRACER": "call paths",
    "FUNCTION_TRACER": "call paths",
    "INET_DIAG": "listing sockets",
    "INET_DIAG_DESTROY": "ending sockets by netlink",
    "INET_RAW_DIAG": "listing raw sockets",
    "INET_TCP_DIAG": "listing TCP sockets",
    "INET_UDP_DIAG": "listing UDP sockets",
    "IPV6": "IPv6 services",
    "KALLSYMS": "names of kernel functions in traces",
    "KPROBES": "call paths without fentry",
    "MPTCP": "sockets that balancing sees as MPTCP",
    "NETFILTER": "what may filter connections on the way",
    "NET_NS": "services of one network namespace",
    "NET_SOCK_MSG": "sockmaps: splicing, and Cilium's and Envoy's",
    "NF_TABLES": "what may filter connections on the way",
    "PREEMPT": "latency",
    "PREEMPT_RT": "latency; locks in programs",
    "SECURITY_LOCKDOWN_LSM": "whether kernel memory may be read: iterators",
    "SOCK_CGROUP_DATA": "the cgroup of a socket",
    "TLS": "kTLS, which splicing leaves alone",
    "VETH": "pods",
    "XDP_SOCKETS": "packets that pass sockets by",
}

STRUCTS = {
    "sock_common": "every socket: addresses, state, handlers",
    "sock": "every socket",
    "inet_sock": "sockets of IPv4 and IPv6",
    "inet_connection_sock": "TCP: accept queue, timers",
    "tcp_sock": "TCP: sequence numbers, counters",
    "udp_sock": "UDP",
    "proto": "handlers of a protocol, which a sockmap replaces",
    "sk_psock": "a socket in a sockmap: its queue, the handlers of before",
    "sk_psock_progs": "programs of a sockmap",
    "sk_psock_link": "the entries of a socket in sockmaps",
    "sk_msg": "bytes that pass from socket to socket",
    "bpf_sock_addr_kern": "what connect hooks see",
    "bpf_sock_ops_kern": "what sock_ops programs see",
    "sock_cgroup_data": "the cgroup of a socket",
    "cgroup_bpf": "programs of a cgroup",
}

FUNCTIONS = {
    "tcp_bpf_": "handlers of TCP sockets in sockmaps",
    "udp_bpf_": "handlers of UDP sockets in sockmaps",
    "unix_bpf_": "handlers of Unix sockets in sockmaps",
    "sk_psock_": "sockets in sockmaps",
    "sk_msg_": "bytes that pass from socket to socket",
    "sock_map_": "sockmaps: inserting, deleting, closing",
    "sock_hash_": "sockhashes: inserting, deleting",
    "bpf_sock_": "programs on sockets",
    "bpf_sk_": "programs on sockets",
    "bpf_iter_": "iterators",
    "__cgroup_bpf_": "running programs of a cgroup",
    "tcp_abort": "ending sockets",
    "udp_abort": "ending sockets",
}

_OPTION = re.compile(r"^CONFIG_(\w+)=(.*)$|^# CONFIG_(\w+) is not set$", re.MULTILINE)
_SYSCTL = Path("/proc/sys")


def read_sysctls() -> dict[str, str]:
    """Return the settings that matter and that there are, of this network namespace."""
    found = {}
    for name in SYSCTLS:
        try:
            text = _SYSCTL.joinpath(*name.split(".")).read_text()
        except OSError:
            continue
        found[name] = " ".join(text.split())
    return found


def parse_options(text: str) -> dict[str, str]:
    """Return the options of a kernel configuration: y, m, n or a value (kconfig's .config)."""
    return {name or unset: value or "n" for name, value, unset in _OPTION.findall(text)}


def configuration() -> str:
    """Return the configuration that the running kernel was built with; "" if nobody tells."""
    for path, unpack in (
        (Path("/proc/config.gz"), gzip.decompress),
        (Path(f"/boot/config-{os.uname().release}"), bytes),
    ):
        with suppress(OSError, EOFError):
            return unpack(path.read_bytes()).decode(errors="replace")
    return ""


def read_options() -> dict[str, str]:
    """Return the build options that matter, n for those that are not set; {} if nobody tells."""
    found = parse_options(configuration())
    return {name: found.get(name, "n") for name in OPTIONS} if found else {}


def read_structs(types: BtfFile) -> Structs:
    """Return the members of the structs that matter, without those that only group others."""
    return {
        name: {member: text for member, text in members.items() if "cacheline_group" not in member}
        for name, members in types.structs(STRUCTS).items()
    }


def read_functions(types: BtfFile) -> list[str]:
    """Return the functions that matter, without the copies that compilers make (`.isra.0`)."""
    return [name for name in types.functions(tuple(FUNCTIONS)) if "." not in name]


def own_types() -> BtfFile | None:
    """Return the running kernel's types; None where it does not tell them."""
    try:
        return BtfFile.open()
    except InputError:
        return None
