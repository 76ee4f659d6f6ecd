/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Fills struct audit_socket. Reads only. */
#ifndef SOCKHOP_AUDIT_SOCKET_H
#define SOCKHOP_AUDIT_SOCKET_H

#define MAPPED bpf_htonl(0xffff)
#define MESSAGES 128 /* of a psock's queue that are counted */

/* The lower bits of sk_user_data are tags: SK_USER_DATA_PTRMASK (include/net/sock.h). Others than
 * psocks use it, too, but a psock points back.
 */
static __always_inline struct sk_psock *psock_of(struct sock *sk)
{
	struct sk_psock *psock =
		(struct sk_psock *)((__u64)BPF_CORE_READ(sk, sk_user_data) & ~7ULL);

	if (!psock || BPF_CORE_READ(psock, sk) != sk)
		return NULL;
	return psock;
}

/* The queue may change meanwhile, so this is bounded and every read may fail. */
static __always_inline void count_spliced(struct audit_socket *out, struct sk_psock *psock)
{
	struct list_head *head = __builtin_preserve_access_index(&psock->ingress_msg);
	struct list_head *at = BPF_CORE_READ(psock, ingress_msg.next);
	struct sk_msg *msg;

	if (at && at != head) {
		msg = (void *)at - bpf_core_field_offset(struct sk_msg, list);
		out->first = (__u64)msg;
		out->first_size = BPF_CORE_READ(msg, sg.size);
	}
	for (int i = 0; i < MESSAGES; i++) {
		if (!at || at == head)
			break;
		msg = (void *)at - bpf_core_field_offset(struct sk_msg, list);
		out->spliced += BPF_CORE_READ(msg, sg.size);
		at = BPF_CORE_READ(at, next);
	}
	if ((at && at != head) || BPF_CORE_READ(psock, ingress_skb.qlen))
		out->flags |= AUDIT_MORE;
}

static __always_inline void fill_psock(struct audit_socket *out, struct sock *sk)
{
	struct sk_psock *psock = psock_of(sk);

	if (!psock)
		return;
	out->flags |= AUDIT_PSOCK;
	if (sk->__sk_common.skc_prot != BPF_CORE_READ(psock, sk_proto))
		out->flags |= AUDIT_HANDLERS;
	if (BPF_CORE_READ(psock, progs.msg_parser))
		out->flags |= AUDIT_PARSER;
	count_spliced(out, psock);
}

static __always_inline void fill_addresses(struct audit_socket *out, struct sock *sk)
{
	if (out->family == AF_INET6) {
		BPF_CORE_READ_INTO(&out->local_address, sk,
				   __sk_common.skc_v6_rcv_saddr.in6_u.u6_addr32);
		BPF_CORE_READ_INTO(&out->remote_address, sk,
				   __sk_common.skc_v6_daddr.in6_u.u6_addr32);
	} else if (out->family == AF_INET) {
		out->local_address[2] = out->remote_address[2] = MAPPED;
		out->local_address[3] = sk->__sk_common.skc_rcv_saddr;
		out->remote_address[3] = sk->__sk_common.skc_daddr;
	}
}

/* The inode of a socket lies behind its struct socket, in struct socket_alloc. */
static __always_inline __u64 inode_of(struct sock *sk)
{
	struct socket *socket = sk->sk_socket;

	if (!socket)
		return 0;
	return BPF_CORE_READ((struct socket_alloc *)socket, vfs_inode.i_ino);
}

static __always_inline void fill_tcp(struct audit_socket *out, struct tcp_sock *tp)
{
	const struct tcp_ulp_ops *ulp = tp->inet_conn.icsk_ulp_ops;

	out->acknowledged = tp->bytes_acked;
	out->received = tp->bytes_received;
	out->rcv_nxt = tp->rcv_nxt;
	out->snd_una = tp->snd_una;
	out->copied_seq = tp->copied_seq;
	out->unread = out->rcv_nxt - out->copied_seq;
	out->waiting = tp->write_seq - out->snd_una;
	out->segs_in = tp->segs_in;
	out->segs_out = tp->segs_out;
	if (ulp)
		BPF_CORE_READ_STR_INTO(&out->ulp, ulp, name);
}

static __always_inline void fill_socket(struct audit_socket *out, struct sock *sk)
{
	struct tcp_sock *tp;

	out->sock = (__u64)sk;
	out->family = sk->__sk_common.skc_family;
	out->state = sk->__sk_common.skc_state;
	out->protocol = sk->sk_protocol;
	out->cookie = sk->__sk_common.skc_cookie.counter;
	out->netns = sk->__sk_common.skc_net.net->ns.inum;
	out->interface = sk->__sk_common.skc_bound_dev_if;
	out->local_port = sk->__sk_common.skc_num;
	out->remote_port = bpf_ntohs(sk->__sk_common.skc_dport);
	out->inode = inode_of(sk);
	if (BPF_CORE_READ_BITFIELD(sk, __sk_common.skc_ipv6only))
		out->flags |= AUDIT_IPV6ONLY;
	fill_addresses(out, sk);
	fill_psock(out, sk);
	tp = bpf_skc_to_tcp_sock(sk);
	if (tp)
		fill_tcp(out, tp);
}

#endif /* SOCKHOP_AUDIT_SOCKET_H */
