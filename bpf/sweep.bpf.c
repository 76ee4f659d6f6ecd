// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Visits the sockets in the sockhash: one program lists them, one takes out those that are not
 * spliced any more and whose queue is empty. Linux kernel commit 03653515fc8c ("net: Allow iterating
 * sockmap and sockhash") (in v5.10).
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "sockhop.h"
#include "splice.h"
#include "maps.h"
#include "provenance.h"
#include "splice_maps.h"

#define SETTLED 1000000000ULL /* ns; a message that was on its way to the queue is there by then */

/* Keeps the struct in the object's BTF, for Python to check its codec against. */
const struct splice_record *splice_record_layout __attribute__((unused));

static __always_inline __u64 socket_inode(struct sock *sk)
{
	struct socket *socket = BPF_CORE_READ(sk, sk_socket);

	if (!socket)
		return 0;
	return BPF_CORE_READ((struct socket_alloc *)socket, vfs_inode.i_ino);
}

static __always_inline bool has_no_bytes(struct sock *sk)
{
	struct sk_psock *psock = psock_of(sk);

	return !psock || queue_is_empty(psock);
}

SEC("iter/sockmap")
int sockhop_spliced(struct bpf_iter__sockmap *ctx)
{
	struct splice_record out = {};
	struct splice_lane *lane;
	struct sock *sk = ctx->sk;
	__u64 *key = ctx->key;

	if (!sk || !key)
		return 0;
	lane = bpf_sk_storage_get(&splice_lanes, sk, 0, 0);
	if (lane) {
		out.lane = *lane;
		out.has_lane = 1;
	}
	out.cookie = *key;
	out.inode = socket_inode(sk);
	out.netns_inode = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	out.state = BPF_CORE_READ(sk, __sk_common.skc_state);
	out.queue_empty = has_no_bytes(sk);
	bpf_seq_write(ctx->meta->seq, &out, sizeof(out));
	return 0;
}

/* Whether from now on nobody splices to this socket, and it to nobody. */
static __always_inline bool is_done(struct splice_lane *lane, __u64 now)
{
	struct splice_pair *pair;
	struct splice_end *own, *peer;

	if (switched_off())
		return true;
	pair = bpf_map_lookup_elem(&splice_pairs, &lane->pair);
	if (!pair || pair->leaves == LEAVES_SOCKHASH)
		return true;
	own = lane->is_a ? &pair->a : &pair->b;
	peer = lane->is_a ? &pair->b : &pair->a;
	/* A client whose server never came: the handshake is over by then. */
	if (!peer->cookie)
		return now - lane->since > SETTLED;
	return own->mode == LANE_STACK && peer->mode == LANE_STACK;
}

SEC("iter/sockmap")
int sockhop_sweep(struct bpf_iter__sockmap *ctx)
{
	__u64 now = bpf_ktime_get_boot_ns();
	struct splice_counters *counters;
	struct splice_lane *lane;
	struct sock *sk = ctx->sk;
	__u64 *key = ctx->key;
	__u64 cookie;

	if (!sk || !key)
		return 0;
	lane = bpf_sk_storage_get(&splice_lanes, sk, 0, 0);
	if (!lane)
		return 0;
	count_spliced(lane);
	if (!is_done(lane, now)) {
		lane->leaving = 0;
		return 0;
	}
	if (!lane->leaving)
		lane->leaving = now;
	if (now - lane->leaving < SETTLED || !has_no_bytes(sk))
		return 0;
	cookie = *key;
	if (bpf_map_delete_elem(&splice_sockets, &cookie))
		return 0;
	counters = counters_of(lane->service);
	if (counters)
		add(&counters->removed, 1);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
