/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* How the hooks remember a socket that connects, and count it where it is. */
#ifndef SOCKHOP_REMEMBER_H
#define SOCKHOP_REMEMBER_H

#define MAPPED bpf_htonl(0xffff)

static __always_inline bool is_mapped(const __be32 *address)
{
	return !address[0] && !address[1] && address[2] == MAPPED;
}

/* Volatile, or clang computes an address within the socket, which the verifier prohibits. */
static __always_inline bool is_connected_to(struct bpf_sock *sk, const __be32 *address, __u16 port)
{
	__be32 peer[4] = { 0, 0, MAPPED, READ_ONCE(sk->dst_ip4) };

	if (sk->family == AF_INET6) {
		peer[0] = READ_ONCE(sk->dst_ip6[0]);
		peer[1] = READ_ONCE(sk->dst_ip6[1]);
		peer[2] = READ_ONCE(sk->dst_ip6[2]);
		peer[3] = READ_ONCE(sk->dst_ip6[3]);
	}
	return sk->state == TCP_ESTABLISHED && READ_ONCE(sk->dst_port) == bpf_htons(port) &&
	       same_address(peer, address);
}

/* ctx is a bpf_sock_addr or a bpf_sock; both give a cookie. */
static __always_inline struct provenance *recall(void *ctx, struct bpf_sock *sk)
{
	struct provenance *p = bpf_sk_storage_get(&provenance, sk, 0, 0);
	__u64 cookie;

	if (p || !setting(SETTING_FALLBACK))
		return p;
	cookie = bpf_get_socket_cookie(ctx);
	return bpf_map_lookup_elem(&provenance_by_cookie, &cookie);
}

static __always_inline void fall_back(void)
{
	__u32 which = SETTING_FALLBACK;
	__u64 one = 1;

	count(TOTAL_STORAGE_FAILED);
	bpf_map_update_elem(&settings, &which, &one, BPF_ANY);
}

static __always_inline void remember(struct bpf_sock_addr *ctx, struct provenance *fresh)
{
	/* Asking for the cookie makes it: from now on every tool can name this socket. */
	__u64 cookie = bpf_get_socket_cookie(ctx);

	if (bpf_sk_storage_get(&provenance, ctx->sk, fresh, BPF_SK_STORAGE_GET_F_CREATE))
		return;
	bpf_map_update_elem(&provenance_by_cookie, &cookie, fresh, BPF_ANY);
	fall_back();
}

static __always_inline void count_socket(struct provenance *p, bool load)
{
	struct live_key key = { .netns = p->netns, .service = p->service, .backend = p->backend };
	__u64 *n = bpf_map_lookup_elem(&live, &key), zero = 0;

	if (!n) {
		/* Two CPUs may come here at once: neither may overwrite the other's count. */
		bpf_map_update_elem(&live, &key, &zero, BPF_NOEXIST);
		n = bpf_map_lookup_elem(&live, &key);
	}
	if (n) {
		add(n, 1);
		p->counted = COUNTED_LIVE;
	} else {
		count(TOTAL_LIVE_FULL);
	}
	n = load ? bpf_map_lookup_elem(&loads, &p->backend) : 0;
	if (n) {
		add(n, 1);
		p->counted |= COUNTED_LOAD;
	}
}

/* A TCP socket that connects again has left its peer, and so has a UDP socket that is not there. One
 * that is there stays if the kernel then finds no route to the new one: it goes on being counted
 * there until the agent has looked.
 */
static __always_inline void leave(struct bpf_sock *sk, struct provenance *old,
				  struct provenance *fresh)
{
	bool stays = old->protocol != IPPROTO_TCP &&
		     !is_connected_to(sk, fresh->backend_address, fresh->backend_port);

	if (stays && is_connected_to(sk, old->backend_address, old->backend_port)) {
		copy_address(fresh->previous_address, old->backend_address);
		fresh->previous_port = old->backend_port;
		fresh->previous_service = old->service;
		fresh->previous_backend = old->backend;
		fresh->previous_counted = take(&old->counted, old->since, old->backend);
	} else if (stays && is_connected_to(sk, old->previous_address, old->previous_port)) {
		copy_address(fresh->previous_address, old->previous_address);
		fresh->previous_port = old->previous_port;
		fresh->previous_service = old->previous_service;
		fresh->previous_backend = old->previous_backend;
		fresh->previous_counted =
			take(&old->previous_counted, old->since, old->previous_backend);
	}
	uncount(old);
	uncount_previous(old);
	fresh->counted |= old->counted + COUNTED_CONNECT;
	fresh->previous_counted |= old->previous_counted + COUNTED_CONNECT;
}

#endif /* SOCKHOP_REMEMBER_H */
