/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What iterators tell of a socket. Reads only: no helper that wants a full or a locked socket. */
#ifndef SOCKHOP_SOCKET_RECORD_H
#define SOCKHOP_SOCKET_RECORD_H

#define MAPPED bpf_htonl(0xffff)

/* Keeps the struct in the object's BTF, for Python to check its codec against. */
const struct socket_record *socket_record_layout __attribute__((unused));

static __always_inline void set_addresses(struct socket_record *out, struct sock *sk)
{
	out->family = BPF_CORE_READ(sk, __sk_common.skc_family);
	out->local_port = BPF_CORE_READ(sk, __sk_common.skc_num);
	out->remote_port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	if (out->family == AF_INET6) {
		BPF_CORE_READ_INTO(&out->local_address, sk,
				   __sk_common.skc_v6_rcv_saddr.in6_u.u6_addr32);
		BPF_CORE_READ_INTO(&out->remote_address, sk,
				   __sk_common.skc_v6_daddr.in6_u.u6_addr32);
		return;
	}
	out->local_address[2] = out->remote_address[2] = MAPPED;
	out->local_address[3] = BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr);
	out->remote_address[3] = BPF_CORE_READ(sk, __sk_common.skc_daddr);
}

/* The inode of a socket lies behind its struct socket, in struct socket_alloc. */
static __always_inline __u64 socket_inode(struct sock *sk)
{
	struct socket *socket = BPF_CORE_READ(sk, sk_socket);

	if (!socket)
		return 0;
	return BPF_CORE_READ((struct socket_alloc *)socket, vfs_inode.i_ino);
}

static __always_inline void set_progress(struct socket_record *out, struct tcp_sock *tp)
{
	out->acknowledged = BPF_CORE_READ(tp, bytes_acked);
	out->received = BPF_CORE_READ(tp, bytes_received);
	out->unread = BPF_CORE_READ(tp, rcv_nxt) - BPF_CORE_READ(tp, copied_seq);
	out->waiting = BPF_CORE_READ(tp, write_seq) - BPF_CORE_READ(tp, snd_una);
	out->segments = BPF_CORE_READ(tp, segs_in);
}

static __always_inline void fill_record(struct socket_record *out, struct sock *sk, __u8 protocol)
{
	out->protocol = protocol;
	out->state = BPF_CORE_READ(sk, __sk_common.skc_state);
	out->cookie = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
	out->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	out->interface = BPF_CORE_READ(sk, __sk_common.skc_bound_dev_if);
	out->inode = socket_inode(sk);
	/* Linux kernel commit 8520e224f547 ("bpf, cgroups: Fix cgroup v2 fallback on v1/v2 mixed
	 * mode") (in v5.15). Before it: 0.
	 */
	if (bpf_core_field_exists(sk->sk_cgrp_data.cgroup))
		out->cgroup = BPF_CORE_READ(sk, sk_cgrp_data.cgroup, kn, id);
	set_addresses(out, sk);
	if (protocol == IPPROTO_TCP)
		set_progress(out, (struct tcp_sock *)sk);
}

#endif /* SOCKHOP_SOCKET_RECORD_H */
