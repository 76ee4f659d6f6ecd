/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Which sockets are meant by a set of backends that are gone. */
#ifndef SOCKHOP_PAIRS_H
#define SOCKHOP_PAIRS_H

/* One pass is for all pairs, however many there are. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct pair);
	__type(value, __u32);
} pairs SEC(".maps");

static __always_inline bool is_at(const struct socket_record *now, const __be32 *address,
				  __u16 port)
{
	return now->state != TCP_CLOSE && now->remote_port == port &&
	       same_address(now->remote_address, address);
}

/* clang 14 would join pointers with `or`, which the verifier does not take: hence the branches. */
static __always_inline bool is_in_pairs(__u32 service, __u32 backend)
{
	struct pair pair = { .service = service, .backend = backend };

	if (bpf_map_lookup_elem(&pairs, &pair))
		return true;
	return false;
}

/* Asked first, since for nearly all sockets it is the whole answer. */
static __always_inline bool could_be_meant(const struct provenance *p)
{
	if (is_in_pairs(p->service, p->backend))
		return true;
	return p->previous_port && is_in_pairs(p->previous_service, p->previous_backend);
}

/* Not where the socket was sent, but where it is: the backend of now or the one before, see
 * struct provenance. The state of an unconnected UDP socket is TCP_CLOSE.
 */
static __always_inline bool is_meant(const struct provenance *p, const struct socket_record *now)
{
	if (is_at(now, p->backend_address, p->backend_port))
		return is_in_pairs(p->service, p->backend);
	return is_at(now, p->previous_address, p->previous_port) &&
	       is_in_pairs(p->previous_service, p->previous_backend);
}

#endif /* SOCKHOP_PAIRS_H */
