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
#include "socket_record.h"
#include "pairs.h"

SEC("iter/bpf_sk_storage_map")
int sockhop_sockets(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct sock *sk = ctx->sk;
	struct provenance *from = ctx->value;
	struct socket_record out = {};

	if (!sk || !from)
		return 0;
	out.provenance = *from;
	fill_record(&out, sk, from->protocol);
	bpf_seq_write(ctx->meta->seq, &out, sizeof(out));
	return 0;
}

/* Only those that are with one of the map pairs. */
SEC("iter/bpf_sk_storage_map")
int sockhop_of_pairs(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct sock *sk = ctx->sk;
	struct provenance *from = ctx->value;
	struct socket_record out = {};

	if (!sk || !from || !could_be_meant(from))
		return 0;
	out.state = BPF_CORE_READ(sk, __sk_common.skc_state);
	set_addresses(&out, sk);
	if (!is_meant(from, &out))
		return 0;
	out.provenance = *from;
	fill_record(&out, sk, from->protocol);
	bpf_seq_write(ctx->meta->seq, &out, sizeof(out));
	return 0;
}

#define CERTAIN_AFTER 1000000000ULL /* ns; a connect() that a hook has seen is through by then */

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
	__u64 since;

	if (!sk || !p)
		return 0;
	since = READ_ONCE(p->since);
	counted = READ_ONCE(p->counted);
	previous_counted = READ_ONCE(p->previous_counted);
	if (!((counted | previous_counted) & COUNTED_BITS) ||
	    bpf_ktime_get_boot_ns() - since < CERTAIN_AFTER)
		return 0;
	key = key_of(p);
	previous = previous_key_of(p);
	now.state = BPF_CORE_READ(sk, __sk_common.skc_state);
	set_addresses(&now, sk);
	if (READ_ONCE(p->since) != since)
		return 0;
	if (is_at(&now, p->backend_address, p->backend_port)) {
		uncount_key(&previous, take_seen(&p->previous_counted, previous_counted, since,
						 previous.backend));
		return 0;
	}
	uncount_key(&key, take_seen(&p->counted, counted, since, key.backend));
	if (!is_at(&now, p->previous_address, p->previous_port))
		uncount_key(&previous, take_seen(&p->previous_counted, previous_counted, since,
						 previous.backend));
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
