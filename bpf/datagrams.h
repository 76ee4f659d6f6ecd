/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Unconnected UDP: which backend a socket uses for a frontend, and whose answer it is.
 *
 * A socket has room for a few frontends in its storage; a program that talks to more of them from
 * one socket gets the others from an LRU.
 */
#ifndef SOCKHOP_DATAGRAMS_H
#define SOCKHOP_DATAGRAMS_H

static __always_inline struct datagram_peer *peer_of(struct datagram_peers *peers,
						     const struct frontend_key *key)
{
	int i;

#pragma unroll
	for (i = 0; i < DATAGRAM_PEERS; i++)
		if (peers->peer[i].backend_port && peers->peer[i].frontend_port == key->port &&
		    same_address(peers->peer[i].frontend_address, key->address))
			return &peers->peer[i];
	return 0;
}

static __always_inline struct datagram_peer *free_peer(struct datagram_peers *peers)
{
	int i;

#pragma unroll
	for (i = 0; i < DATAGRAM_PEERS; i++)
		if (!peers->peer[i].backend_port)
			return &peers->peer[i];
	return 0;
}

/* Whether the socket uses this backend for a frontend: its answers could be for either. */
static __always_inline bool uses(struct datagram_peers *peers, const struct slot *backend)
{
	int i;

#pragma unroll
	for (i = 0; i < DATAGRAM_PEERS; i++)
		if (peers->peer[i].backend_port == backend->port &&
		    same_address(peers->peer[i].backend_address, backend->address))
			return true;
	return false;
}

static __always_inline void fill_overflow_key(struct overflow_key *key, __u64 cookie,
					      enum direction direction, const __be32 *address,
					      __u16 port)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->cookie = cookie;
	key->direction = direction;
	key->port = port;
	copy_address(key->address, address);
}

static __always_inline void overflow(__u64 cookie, enum direction direction, const __be32 *from,
				     __u16 from_port, const __be32 *to, __u16 to_port,
				     __u32 backend)
{
	struct overflow_peer peer = { .backend = backend, .port = to_port };
	struct overflow_key key;

	fill_overflow_key(&key, cookie, direction, from, from_port);
	copy_address(peer.address, to);
	bpf_map_update_elem(&datagram_overflow, &key, &peer, BPF_ANY);
}

/* The backend that the socket used last for this frontend, if it is still active. */
static __always_inline bool same_as_before(struct datagram_peers *peers, __u64 cookie,
					   const struct frontend_key *key, struct slot *chosen)
{
	struct datagram_peer *peer = peer_of(peers, key);
	struct overflow_peer *other;
	struct overflow_key forward;

	if (peer) {
		if (!still_active(peer->backend, chosen))
			return false;
		peer->used = ++peers->clock;
		return true;
	}
	if (!peers->overflown)
		return false;
	fill_overflow_key(&forward, cookie, TO_BACKEND, key->address, key->port);
	other = bpf_map_lookup_elem(&datagram_overflow, &forward);
	return other && still_active(READ_ONCE(other->backend), chosen);
}

static __always_inline void keep_peer(struct datagram_peers *peers, __u64 cookie,
				      const struct frontend_key *key, const struct slot *chosen)
{
	struct datagram_peer *peer = peer_of(peers, key);

	if (peer) {
		/* A late answer of the backend of before still has its frontend. */
		overflow(cookie, TO_FRONTEND, peer->backend_address, peer->backend_port,
			 peer->frontend_address, peer->frontend_port, peer->backend);
		peers->overflown = 1;
	} else {
		peer = free_peer(peers);
	}
	if (!peer) {
		overflow(cookie, TO_BACKEND, key->address, key->port, chosen->address, chosen->port,
			 chosen->backend);
		overflow(cookie, TO_FRONTEND, chosen->address, chosen->port, key->address,
			 key->port, chosen->backend);
		peers->overflown = 1;
		return;
	}
	copy_address(peer->frontend_address, key->address);
	copy_address(peer->backend_address, chosen->address);
	peer->frontend_port = key->port;
	peer->backend_port = chosen->port;
	peer->backend = chosen->backend;
	peer->used = ++peers->clock;
}

struct origin {
	__be32 address[4];
	__u16 port;
};

/* The frontend whose answer this is: of several, the one that was used last. */
static __always_inline bool origin_of(struct datagram_peers *peers, __u64 cookie,
				      const __be32 *source, __u16 port, struct origin *origin)
{
	struct overflow_peer *other;
	struct overflow_key reverse;
	__u32 latest = 0;
	int i;

#pragma unroll
	for (i = 0; i < DATAGRAM_PEERS; i++) {
		struct datagram_peer *peer = &peers->peer[i];

		if (peer->backend_port != port || !same_address(peer->backend_address, source) ||
		    peer->used < latest)
			continue;
		latest = peer->used;
		copy_address(origin->address, peer->frontend_address);
		origin->port = peer->frontend_port;
	}
	if (latest)
		return true;
	if (!peers->overflown)
		return false;
	fill_overflow_key(&reverse, cookie, TO_FRONTEND, source, port);
	other = bpf_map_lookup_elem(&datagram_overflow, &reverse);
	if (!other)
		return false;
	copy_address(origin->address, other->address);
	origin->port = READ_ONCE(other->port);
	return true;
}

#endif /* SOCKHOP_DATAGRAMS_H */
