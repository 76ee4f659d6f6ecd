/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Which connections are spliced at all: both ends must be opted in, each by itself. */
#ifndef SOCKHOP_SPLICE_OPTIN_H
#define SOCKHOP_SPLICE_OPTIN_H

#define MAPPED bpf_htonl(0xffff)
#define DEEPEST 32

/* A connection as one of its ends sees it. netns: cookie, for loopback addresses; else 0. */
struct view {
	__be32 local[4];
	__be32 remote[4];
	__u64 netns;
	__u16 local_port;
	__u16 remote_port;
	__u8 pad[4];
};

static __always_inline bool is_loopback(const __be32 *address)
{
	if (address[0] || address[1])
		return false;
	if (address[2] == MAPPED)
		return (bpf_ntohl(address[3]) >> 24) == 127;
	return !address[2] && address[3] == bpf_htonl(1);
}

static __always_inline void look(struct bpf_sock_ops *ctx, struct view *at)
{
	if (ctx->family == AF_INET6) {
		at->local[0] = ctx->local_ip6[0];
		at->local[1] = ctx->local_ip6[1];
		at->local[2] = ctx->local_ip6[2];
		at->local[3] = ctx->local_ip6[3];
		at->remote[0] = ctx->remote_ip6[0];
		at->remote[1] = ctx->remote_ip6[1];
		at->remote[2] = ctx->remote_ip6[2];
		at->remote[3] = ctx->remote_ip6[3];
	} else {
		at->local[0] = at->local[1] = at->remote[0] = at->remote[1] = 0;
		at->local[2] = at->remote[2] = MAPPED;
		at->local[3] = ctx->local_ip4;
		at->remote[3] = ctx->remote_ip4;
		/* Keeps the compiler from merging the branches' loads through one pointer. */
		asm volatile("" ::: "memory");
	}
	at->local_port = ctx->local_port;
	at->remote_port = bpf_ntohl(ctx->remote_port);
	at->netns =
		is_loopback(at->local) || is_loopback(at->remote) ? bpf_get_netns_cookie(ctx) : 0;
	__builtin_memset(at->pad, 0, sizeof(at->pad));
}

/* Less than 0 if the local end is the lesser. */
static __always_inline int compare_ends(const struct view *at)
{
	if (at->local[0] != at->remote[0])
		return at->local[0] < at->remote[0] ? -1 : 1;
	if (at->local[1] != at->remote[1])
		return at->local[1] < at->remote[1] ? -1 : 1;
	if (at->local[2] != at->remote[2])
		return at->local[2] < at->remote[2] ? -1 : 1;
	if (at->local[3] != at->remote[3])
		return at->local[3] < at->remote[3] ? -1 : 1;
	return at->local_port < at->remote_port ? -1 : 1;
}

static __always_inline struct splice_policy *place_policy(const __be32 *address, __u64 netns,
							  __u16 port)
{
	struct splice_place place = { .netns = netns, .port = port };
	struct splice_policy *found;

	copy_address(place.address, address);
	found = bpf_map_lookup_elem(&splice_places, &place);
	if (found)
		return found;
	place.port = 0;
	return bpf_map_lookup_elem(&splice_places, &place);
}

static __always_inline bool uses_cgroups(void)
{
	__u32 which = SPLICE_CGROUPS;
	__u64 *set = bpf_map_lookup_elem(&splice_settings, &which);

	return set && *set;
}

/* Before Linux kernel commit 7f203bc89eb6 ("cgroup: Replace cgroup->ancestor_ids[] with
 * ->ancestors[]") (in v6.1).
 */
struct cgroup___ids {
	int level;
	__u64 ancestor_ids[];
} __attribute__((preserve_access_index));

/* Not inlined: clang would read both offsets before the loop, where one of them must not be. */
static __noinline __u64 ancestor_id(struct cgroup *cgroup, int level)
{
	struct cgroup___ids *older = (void *)cgroup;

	if (!bpf_core_field_exists(cgroup->ancestors))
		return BPF_CORE_READ(older, ancestor_ids[level]);
	return BPF_CORE_READ(cgroup, ancestors[level], kn, id);
}

static __always_inline struct splice_policy *cgroup_policy(struct bpf_sock *sk)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	struct splice_owner owner = { .kind = OWNER_CGROUP };
	struct splice_policy *found = 0;
	struct cgroup *cgroup;
	int level, depth;

	if (!tp)
		return 0;
	cgroup = BPF_CORE_READ((struct sock *)tp, sk_cgrp_data.cgroup);
	level = BPF_CORE_READ(cgroup, level);
	for (depth = 0; depth < DEEPEST && !found && level - depth >= 0; depth++) {
		owner.id = ancestor_id(cgroup, level - depth);
		found = bpf_map_lookup_elem(&splice_owners, &owner);
	}
	return found;
}

/* By whom a socket was made, whatever it is connected to. */
static __always_inline struct splice_policy *owner_policy(struct bpf_sock_ops *ctx,
							  struct bpf_sock *sk)
{
	struct splice_owner owner = { .kind = OWNER_NETNS, .id = bpf_get_netns_cookie(ctx) };
	struct splice_policy *found = bpf_map_lookup_elem(&splice_owners, &owner);

	if (!found && sk && uses_cgroups())
		found = cgroup_policy(sk);
	return found;
}

static __always_inline bool server_policy(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
					  const struct view *at, struct splice_policy *policy)
{
	struct splice_policy *found = place_policy(at->local, at->netns, at->local_port);

	if (!found)
		found = owner_policy(ctx, sk);
	if (!found || found->mode == SPLICE_NEVER)
		return false;
	*policy = *found;
	return true;
}

/* A client is opted in by the service that it dialled, by the address, or by where it lives. */
static __always_inline bool client_policy(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
					  const struct view *at, struct splice_policy *policy)
{
	struct provenance *from = bpf_sk_storage_get(&provenance, sk, 0, 0);
	struct splice_policy *found = 0;
	__u32 service = 0;

	if (from && from->backend_port == at->remote_port &&
	    same_address(from->backend_address, at->remote)) {
		service = from->service;
		found = bpf_map_lookup_elem(&splice_services, &service);
	}
	if (!found) {
		found = place_policy(at->remote, at->netns, at->remote_port);
		if (found && !found->dialled)
			found = 0;
	}
	if (!found)
		found = owner_policy(ctx, sk);
	if (!found || found->mode == SPLICE_NEVER)
		return false;
	*policy = *found;
	return true;
}

/* Where the handshake of a connection has its place, and the mark that it leaves there. */
struct handshake {
	__u64 *place;
	__u64 mark;
};

static __always_inline __u64 mix(__u64 hash, __u64 more)
{
	hash = (hash ^ more) * 0x9e3779b97f4a7c15ULL;
	return hash ^ hash >> 32;
}

static __always_inline __u64 mix_end(__u64 hash, const __be32 *address, __u16 port)
{
	hash = mix(hash, (__u64)address[0] << 32 | address[1]);
	hash = mix(hash, (__u64)address[2] << 32 | address[3]);
	return mix(hash, port);
}

static __always_inline struct handshake find_handshake(const struct view *at, bool is_server)
{
	struct handshake found;
	__u64 hash;
	__u32 where;

	if (is_server) {
		hash = mix_end(at->netns, at->local, at->local_port);
		hash = mix_end(hash, at->remote, at->remote_port);
	} else {
		hash = mix_end(at->netns, at->remote, at->remote_port);
		hash = mix_end(hash, at->local, at->local_port);
	}
	where = hash % SPLICE_HANDSHAKES;
	found.place = bpf_map_lookup_elem(&splice_handshakes, &where);
	found.mark = hash | 1; /* never 0; numbers of pairs are even */
	return found;
}

/* A SYN has come: if the listener is opted in, the client's socket may be put into the sockhash.
 * tcp_openreq_init_rwin() calls this before the SYN-ACK, and without a socket that has a cgroup.
 */
static __always_inline void expect(struct bpf_sock_ops *ctx)
{
	struct splice_policy policy = {};
	struct handshake handshake;
	struct view at;

	look(ctx, &at);
	if (!uses_cgroups() && !server_policy(ctx, 0, &at, &policy))
		return;
	handshake = find_handshake(&at, true);
	if (handshake.place)
		*handshake.place = handshake.mark;
}

#endif /* SOCKHOP_SPLICE_OPTIN_H */
