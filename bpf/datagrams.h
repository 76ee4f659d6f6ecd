/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Unconnected UDP: which backend a socket uses for a frontend, and whose answer it is.
 *
 * A socket has room for a few frontends in its storage; a program that talks to more of them from
 * one socket gets the others from an LRU, and so does a socket without storage (`peers` is null).
 *
 * Threads may share a socket, but hooks of sendmsg and recvmsg run with it locked, one at a time
 * (BPF_CGROUP_RUN_SA_PROG_LOCK() in include/linux/bpf-cgroup.h), and nobody else writes here.
 */
#ifndef SOCKHOP_DATAGRAMS_H
#define SOCKHOP_DATAGRAMS_H

/* The verifier walks every path, so comparisons here are sums and not branches. */
static __always_inline __u32 same(const __be32 *a, __u16 a_port, const __be32 *b, __u16 b_port)
{
	__u64 difference =
		(a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a_port ^ b_port);

	asm volatile("" : "+r"(difference)); /* or clang sees a comparison, and branches */
	return (difference - 1) >> 63;
}

/* One of the peers that the bits name; null for none. */
static __always_inline struct datagram_peer *peer_in(struct datagram_peers *peers, __u32 bits)
{
	__u32 lowest = bits & -bits;

	/* 1, 2, 4, 8 to 0, 1, 2, 3 */
	return bits ? &peers->peer[((lowest >> 1) - (lowest >> 3)) & (DATAGRAM_PEERS - 1)] : 0;
}

/* The peers of a frontend, at most one. */
static __always_inline __u32 peers_of(struct datagram_peers *peers, const struct frontend_key *key)
{
	__u32 bits = 0;
	int i;

#pragma unroll
	for (i = 0; i < DATAGRAM_PEERS; i++)
		bits |= same(peers->peer[i].frontend_address, peers->peer[i].frontend_port,
			     key->address, key->port)
			<< i;
	return bits;
}

/* The peers whose answers come from there. */
static __always_inline __u32 peers_at(struct datagram_peers *peers, const __be32 *address,
				      __u16 port)
{
	__u32 bits = 0;
	int i;

#pragma unroll
	for (i = 0; i < DATAGRAM_PEERS; i++)
		bits |= same(peers->peer[i].backend_address, peers->peer[i].backend_port, address,
			     port)
			<< i;
	return bits;
}

/* --- in the LRU ---------------------------------------------------------------------------- */

static __always_inline bool may_overflow(const struct datagram_peers *peers)
{
	return peers ? READ_ONCE(peers->overflown) : setting(SETTING_FALLBACK);
}

static __always_inline struct overflow_key overflow_key(__u64 cookie, enum direction direction,
							const __be32 *address, __u16 port)
{
	struct overflow_key key;

	__builtin_memset(&key, 0, sizeof(key));
	key.cookie = cookie;
	key.direction = direction;
	key.port = port;
	copy_address(key.address, address);
	return key;
}

static __always_inline bool leads_to(struct overflow_peer *peer, const __be32 *address, __u16 port)
{
	return same(peer->address, READ_ONCE(peer->port), address, port);
}

/* Of several frontends that had this backend, the one that was used last gets its answers. */
static __always_inline void lead_back(__u64 cookie, const struct datagram_peer *peer)
{
	struct overflow_key key =
		overflow_key(cookie, TO_FRONTEND, peer->backend_address, peer->backend_port);
	struct overflow_peer *now = bpf_map_lookup_elem(&datagram_overflow, &key), fresh = {};

	if (now && READ_ONCE(now->used) > peer->used)
		return;
	if (now && leads_to(now, peer->frontend_address, peer->frontend_port)) {
		now->used = peer->used;
		return;
	}
	copy_address(fresh.address, peer->frontend_address);
	fresh.port = peer->frontend_port;
	fresh.backend = peer->backend;
	fresh.used = peer->used;
	bpf_map_update_elem(&datagram_overflow, &key, &fresh, BPF_ANY);
}

static __always_inline void keep_overflow(__u64 cookie, const struct datagram_peer *peer)
{
	struct overflow_key key =
		overflow_key(cookie, TO_BACKEND, peer->frontend_address, peer->frontend_port);
	struct overflow_peer fresh = {
		.backend = peer->backend,
		.used = peer->used,
		.port = peer->backend_port,
	};

	copy_address(fresh.address, peer->backend_address);
	bpf_map_update_elem(&datagram_overflow, &key, &fresh, BPF_ANY);
	lead_back(cookie, peer);
}

/* --- sending ------------------------------------------------------------------------------- */

static __always_inline struct datagram_peer new_peer(const struct frontend_key *key)
{
	struct datagram_peer peer = { .frontend_port = key->port };

	copy_address(peer.frontend_address, key->address);
	return peer;
}

static __always_inline void use_backend(struct datagram_peer *peer, const struct slot *chosen)
{
	copy_address(peer->backend_address, chosen->address);
	peer->backend_port = chosen->port;
	peer->backend = chosen->backend;
}

/* The id of the backend that the socket has used for this frontend, 0 for none; it is used now. */
static __always_inline __u32 backend_before(struct datagram_peers *peers, __u64 cookie,
					    const struct frontend_key *key, __u32 *used)
{
	struct overflow_peer *other;
	struct overflow_key forward;
	struct datagram_peer *peer;
	__u32 id = 0;

	if (peers) {
		*used = ++peers->clock;
		peer = peer_in(peers, peers_of(peers, key));
		if (peer) {
			peer->used = *used;
			id = peer->backend;
		}
		/* Else clang makes two paths of the rest, and the verifier takes half as long again. */
		asm volatile("" ::: "memory");
	}
	if (id || !may_overflow(peers))
		return id;
	forward = overflow_key(cookie, TO_BACKEND, key->address, key->port);
	other = bpf_map_lookup_elem(&datagram_overflow, &forward);
	return other ? READ_ONCE(other->backend) : 0;
}

/* Whether the socket has this backend for another frontend: its answers could be for either. */
static __always_inline bool shares(struct datagram_peers *peers, __u64 cookie,
				   const struct frontend_key *key, const struct slot *backend)
{
	struct overflow_peer *other;
	struct overflow_key reverse;
	__u32 found = 0;

	if (peers)
		found = peers_at(peers, backend->address, backend->port) & ~peers_of(peers, key);
	if (found || !may_overflow(peers))
		return found;
	reverse = overflow_key(cookie, TO_FRONTEND, backend->address, backend->port);
	other = bpf_map_lookup_elem(&datagram_overflow, &reverse);
	return other && !leads_to(other, key->address, key->port);
}

static __always_inline void keep_peer(struct datagram_peers *peers, __u64 cookie,
				      const struct frontend_key *key,
				      const struct datagram_peer *fresh)
{
	struct datagram_peer before = {}, *peer = 0;
	const __be32 nowhere[4] = {};
	__u32 bits;

	if (peers) {
		bits = peers_of(peers, key);
		peer = peer_in(peers, bits ? bits : peers_at(peers, nowhere, 0));
		if (peer) {
			before = *peer;
			*peer = *fresh;
		}
		if (!peer || before.backend_port)
			peers->overflown = 1;
	}
	/* A late answer of the backend of before still has its frontend. */
	if (before.backend_port)
		lead_back(cookie, &before);
	if (!peer)
		keep_overflow(cookie, fresh);
}

/* --- receiving ----------------------------------------------------------------------------- */

struct origin {
	__be32 address[4];
	__u16 port;
};

/* The frontend whose answer this is: of several, the one that was used last. */
static __always_inline bool origin_of(struct datagram_peers *peers, __u64 cookie,
				      const struct frontend_key *source, struct origin *origin)
{
	struct overflow_peer *other;
	struct overflow_key reverse;
	__u32 latest = 0;
	int i;

	if (peers) {
#pragma unroll
		for (i = 0; i < DATAGRAM_PEERS; i++) {
			struct datagram_peer *peer = &peers->peer[i];

			if (peer->used < latest || !same(peer->backend_address, peer->backend_port,
							 source->address, source->port))
				continue;
			latest = peer->used;
			copy_address(origin->address, peer->frontend_address);
			origin->port = peer->frontend_port;
		}
	}
	if (!may_overflow(peers))
		return latest;
	reverse = overflow_key(cookie, TO_FRONTEND, source->address, source->port);
	other = bpf_map_lookup_elem(&datagram_overflow, &reverse);
	if (!other || READ_ONCE(other->used) < latest)
		return latest;
	copy_address(origin->address, other->address);
	origin->port = READ_ONCE(other->port);
	return true;
}

#endif /* SOCKHOP_DATAGRAMS_H */
