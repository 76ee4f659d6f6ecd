"""The kernel functions that a call path is made of: where each is defined, and has its socket.

Files as of Linux 5.10 to 7.3; in a vendor's kernel they may differ. A kernel has only some of the
functions.
"""

from enum import StrEnum
from typing import NamedTuple

__all__ = ["FUNCTIONS", "Function", "Place", "file_of"]


class Place(StrEnum):
    """The program for a function (bpf/trace.bpf.c), by where its struct sock or socket is."""

    SOCK_1 = "sockhop_sock_1"
    SOCK_2 = "sockhop_sock_2"
    SOCK_3 = "sockhop_sock_3"
    SOCKET_1 = "sockhop_socket_1"
    TRANSFER = "sockhop_transfer"


class Function(NamedTuple):
    """A function: `life` means that it decides over a socket's handlers, or ends it.

    `result`: the program for its return, "" if that is not recorded.
    """

    name: str
    file: str
    place: Place
    life: bool = False
    result: str = ""


def _all(file: str, place: Place, names: str, *, life: bool = False) -> list[Function]:
    return [Function(name, file, place, life) for name in names.split()]


_INET, _INET6 = "net/ipv4/af_inet.c", "net/ipv6/af_inet6.c"
_TCP, _TCP_BPF = "net/ipv4/tcp.c", "net/ipv4/tcp_bpf.c"
_SKMSG, _SOCK_MAP = "net/core/skmsg.c", "net/core/sock_map.c"
_TLS, _MPTCP = "net/tls/tls_sw.c", "net/mptcp/protocol.c"

_LISTED = [
    Function("inet_recvmsg", _INET, Place.TRANSFER, result="sockhop_received"),
    Function("inet_sendmsg", _INET, Place.TRANSFER, result="sockhop_sent"),
    Function("inet6_recvmsg", _INET6, Place.TRANSFER, result="sockhop_received"),
    Function("inet6_sendmsg", _INET6, Place.TRANSFER, result="sockhop_sent"),
    *_all(_INET, Place.SOCKET_1, "inet_shutdown inet_release inet_sendpage inet_splice_eof"),
    *_all(_INET6, Place.SOCKET_1, "inet6_release"),
    *_all(_TCP, Place.SOCKET_1, "tcp_splice_read"),
    *_all(_TCP, Place.SOCK_1, "tcp_recvmsg tcp_recvmsg_locked tcp_sendmsg tcp_sendmsg_locked"),
    *_all(_TCP, Place.SOCK_1, "tcp_sendpage tcp_read_sock tcp_close tcp_shutdown tcp_disconnect"),
    *_all("net/ipv4/tcp_input.c", Place.SOCK_1, "tcp_reset", life=True),
    *_all(_TCP, Place.SOCK_1, "tcp_abort", life=True),
    *_all("net/ipv4/tcp_ipv4.c", Place.SOCK_1, "tcp_v4_connect"),
    *_all("net/ipv6/tcp_ipv6.c", Place.SOCK_1, "tcp_v6_connect"),
    *_all(_TCP_BPF, Place.SOCK_1, "tcp_bpf_recvmsg tcp_bpf_recvmsg_parser tcp_bpf_sendmsg"),
    *_all(_TCP_BPF, Place.SOCK_1, "tcp_bpf_sendpage tcp_bpf_send_verdict tcp_bpf_sendmsg_redir"),
    *_all(_TCP_BPF, Place.SOCK_1, "bpf_tcp_ingress tcp_bpf_push"),
    *_all(_TCP_BPF, Place.SOCK_1, "tcp_bpf_get_proto tcp_bpf_update_proto", life=True),
    *_all(_SKMSG, Place.SOCK_1, "sk_psock_msg_verdict sk_msg_recvmsg"),
    *_all(_SKMSG, Place.SOCK_1, "sk_psock_init sk_psock_drop", life=True),
    *_all(_SOCK_MAP, Place.SOCK_1, "sock_map_close sock_map_destroy sock_map_unhash", life=True),
    *_all(_SOCK_MAP, Place.SOCK_2, "sock_map_link", life=True),
    *_all(_SOCK_MAP, Place.SOCK_3, "sock_hash_update_common sock_map_update_common", life=True),
    *_all(_TLS, Place.SOCK_1, "tls_sw_recvmsg tls_sw_sendmsg"),
    *_all("net/tls/tls_main.c", Place.SOCK_1, "tls_init", life=True),
    *_all(_MPTCP, Place.SOCK_1, "mptcp_recvmsg mptcp_sendmsg"),
]
FUNCTIONS = {each.name: each for each in _LISTED}
"""Those that are traced, by name."""

# Others that are often seen on the stacks of these.
_SEEN = {
    "net/socket.c": "sock_recvmsg sock_sendmsg __sock_sendmsg sock_read_iter sock_write_iter "
    "__sys_recvfrom __sys_sendto sock_close __sock_release",
    _SOCK_MAP: "bpf_sock_hash_update bpf_sock_map_update sock_map_remove_links sock_map_unref "
    "sock_map_del_link sock_hash_delete_elem sock_map_update_elem sock_map_update_elem_sys "
    "sock_hash_free sock_map_free",
    _TCP: "tcp_init_transfer inet_csk_destroy_sock tcp_set_state __tcp_close tcp_done",
    "net/ipv4/tcp_input.c": "tcp_rcv_state_process tcp_rcv_established tcp_data_queue "
    "tcp_data_ready tcp_finish_connect tcp_rcv_synsent_state_process tcp_fin",
    "net/ipv4/tcp_minisocks.c": "tcp_child_process tcp_check_req",
    "net/ipv4/tcp_ipv4.c": "tcp_v4_rcv tcp_v4_do_rcv tcp_v4_destroy_sock tcp_v4_syn_recv_sock",
    "net/ipv6/tcp_ipv6.c": "tcp_v6_rcv tcp_v6_do_rcv",
    "net/ipv4/inet_connection_sock.c": "inet_csk_complete_hashdance",
    "net/core/sock.c": "sock_def_readable release_sock __release_sock",
    "kernel/bpf/cgroup.c": "__cgroup_bpf_run_filter_sock_ops",
    _TCP_BPF: "tcp_bpf_push_locked tcp_bpf_ioctl",
}
_FILES = {name: file for file, names in _SEEN.items() for name in names.split()} | {
    each.name: each.file for each in _LISTED
}


def file_of(name: str) -> str:
    """Return the kernel's source file that defines a function, "" where it is not known."""
    return _FILES.get(name, "")
