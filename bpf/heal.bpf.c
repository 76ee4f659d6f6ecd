// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Deletes entries of one sockhash that were called stale, if they still are. The kernel has no
 * compare-and-delete, so what is looked at and what is deleted are one run of a program apart. Linux
 * kernel commit 03653515fc8c ("net: Allow iterating sockmap and sockhash") (in v5.10).
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "audit.h"
#include "audit_socket.h"

/* Keeps the structs in the object's BTF, for Python to check its codecs against. */
const struct heal_record *heal_record_layout __attribute__((unused));
const struct doom *doom_layout __attribute__((unused));

/* net/core/sock_map.c */
struct hlist_node {
	struct hlist_node **pprev;
} __attribute__((preserve_access_index));

struct bpf_shtab_elem {
	struct hlist_node node;
	__u8 key[];
} __attribute__((preserve_access_index));

/* The sockhash to heal: user space puts it in this one's place. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 1);
	__uint(key_size, 4);
	__uint(value_size, 4);
} target SEC(".maps");

/* By the entry's key: user space sets its size. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(key_size, 4);
	__uint(value_size, sizeof(struct doom));
} doomed SEC(".maps");

/* One reader at a time has this object. */
static struct {
	struct heal_record record;
	__u8 key[KEY_MAX];
} out;

static __always_inline bool same_address(const __be32 *a, const __be32 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

static __always_inline bool is_as_before(const struct doom *doom, const struct audit_socket *now)
{
	return doom->sock == now->sock && doom->cookie == now->cookie &&
	       doom->state == now->state && doom->local_port == now->local_port &&
	       doom->remote_port == now->remote_port &&
	       same_address(doom->local_address, now->local_address) &&
	       same_address(doom->remote_address, now->remote_address);
}

/* Whether an entry is in its map still: else its key may be another's. */
static __always_inline bool is_linked(const void *key)
{
	const void *entry = key - bpf_core_field_offset(struct bpf_shtab_elem, key);
	const void *node = entry + bpf_core_field_offset(struct bpf_shtab_elem, node);
	const struct hlist_node *next = 0;

	/* hlist_del_rcu() leaves a pprev that cannot be read. */
	bpf_probe_read_kernel(&next, sizeof(next),
			      BPF_CORE_READ((const struct hlist_node *)node, pprev));
	return next == node;
}

static __always_inline void report(struct seq_file *seq, __u32 size, __u8 result, __s64 error)
{
	out.record.result = result;
	out.record.error = -error;
	bpf_seq_write(seq, &out, sizeof(out.record) + size);
}

SEC("iter/sockmap")
int sockhop_heal(struct bpf_iter__sockmap *ctx)
{
	struct seq_file *seq = ctx->meta->seq;
	struct audit_socket now = {};
	struct sock *sk = ctx->sk;
	void *key = ctx->key;
	struct doom *doom;
	__u32 size;
	long error;

	if (!sk || !key)
		return 0;
	size = ctx->map->key_size;
	if (size > KEY_MAX)
		return 0;
	bpf_probe_read_kernel(out.key, size, key);
	doom = bpf_map_lookup_elem(&doomed, out.key);
	if (!doom)
		return 0;
	fill_socket(&now, sk);
	out.record.unread = now.spliced;
	out.record.more = !!(now.flags & AUDIT_MORE);
	if (!is_as_before(doom, &now)) {
		report(seq, size, HEAL_CHANGED, 0);
		return 0;
	}
	if ((now.spliced || out.record.more) && !doom->lose) {
		report(seq, size, HEAL_UNREAD, 0);
		return 0;
	}
	/* What does not fit is asked for again, so it is written before the entry goes. */
	out.record.result = HEAL_DELETED;
	out.record.error = 0;
	if (bpf_seq_write(seq, &out, sizeof(out.record) + size))
		return 0;
	/* All this takes long enough for close() and a new connection. */
	if (!is_linked(key)) {
		report(seq, size, HEAL_CHANGED, 0);
		return 0;
	}
	error = bpf_map_delete_elem(&target, out.key);
	if (error)
		report(seq, size, HEAL_REFUSED, error);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
