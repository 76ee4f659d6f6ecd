// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Tells the cookie of a network namespace where SO_NETNS_COOKIE cannot: of the one in which a socket
 * is made. Linux kernel commit f318903c0bf4 ("bpf: Add netns cookie and enable it for bpf cgroup
 * hooks") (in v5.7).
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

/* By the socket's cookie. Others in the cgroup make sockets, too: theirs are soon forgotten. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, __u64);
} cookies SEC(".maps");

SEC("cgroup/sock_create")
int sockhop_cookie(struct bpf_sock *sk)
{
	__u64 made = bpf_get_socket_cookie(sk), of = bpf_get_netns_cookie(sk);

	bpf_map_update_elem(&cookies, &made, &of, BPF_ANY);
	return 1;
}

char LICENSE[] SEC("license") = "GPL";
