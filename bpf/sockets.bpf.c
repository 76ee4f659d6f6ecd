// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Lists balanced sockets: those that have a provenance, in every network namespace at once, and
 * the processes that hold them. iter/bpf_sk_storage_map visits only sockets with an element in the
 * map: Linux kernel commit 5ce6e77c7edf ("bpf: Implement bpf iterator for sock local storage map")
 * (in v5.10).
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "sockhop.h"
#include "maps.h"
#include "provenance.h"

#define MAPPED bpf_htonl(0xffff)

/* Keeps the struct in the object's BTF, for Python to check its codec against. */
const struct socket_record *socket_record_layout __attribute__((unused));

static __always_inline void set_addresses(struct socket_record *out, struct sock *sk)
{
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

SEC("iter/bpf_sk_storage_map")
int sockhop_sockets(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct sock *sk = ctx->sk;
	struct provenance *from = ctx->value;
	struct socket_record out = {};

	if (!sk || !from)
		return 0;
	out.provenance = *from;
	out.family = BPF_CORE_READ(sk, __sk_common.skc_family);
	out.state = BPF_CORE_READ(sk, __sk_common.skc_state);
	out.cookie = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
	out.netns_inode = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	out.local_port = BPF_CORE_READ(sk, __sk_common.skc_num);
	out.remote_port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	out.inode = socket_inode(sk);
	set_addresses(&out, sk);
	bpf_seq_write(ctx->meta->seq, &out, sizeof(out));
	return 0;
}

#define CERTAIN_AFTER 1000000000ULL /* ns; a connect() that a hook has seen is through by then */

static __always_inline bool is_at(const struct socket_record *now, const __be32 *address,
				  __u16 port)
{
	return now->state != TCP_CLOSE && now->remote_port == port &&
	       same_address(now->remote_address, address);
}

/* Uncounts sockets that have left their backend where no hook saw it: connect(AF_UNSPEC), a refused
 * connect, a UDP socket that went to another peer. The words are read first: where a connect comes
 * between that and the end, they differ and nothing is taken.
 */
SEC("iter/bpf_sk_storage_map")
int sockhop_settle(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct provenance *p = ctx->value;
	struct socket_record now = {};
	struct sock *sk = ctx->sk;
	__u32 counted, previous_counted;
	struct live_key key, previous;

	if (!sk || !p)
		return 0;
	counted = READ_ONCE(p->counted);
	previous_counted = READ_ONCE(p->previous_counted);
	if (!((counted | previous_counted) & COUNTED_BITS) ||
	    bpf_ktime_get_boot_ns() - READ_ONCE(p->since) < CERTAIN_AFTER)
		return 0;
	key = key_of(p);
	previous = previous_key_of(p);
	now.family = BPF_CORE_READ(sk, __sk_common.skc_family);
	now.state = BPF_CORE_READ(sk, __sk_common.skc_state);
	now.remote_port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	set_addresses(&now, sk);
	if (is_at(&now, p->backend_address, p->backend_port)) {
		uncount_key(&previous, take_seen(&p->previous_counted, previous_counted));
		return 0;
	}
	uncount_key(&key, take_seen(&p->counted, counted));
	if (!is_at(&now, p->previous_address, p->previous_port))
		uncount_key(&previous, take_seen(&p->previous_counted, previous_counted));
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
