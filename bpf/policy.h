/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Whether a policy lets a socket go where balancing has sent it.
 *
 * The word names an epoch. Who a socket is, its network namespace and the cgroup in which it was
 * made, gives in this epoch a set of rules; the set and the address give a class of addresses; the
 * class, the protocol and the port give the verdict. A change is a new epoch: the agent writes all
 * of it, stores the word, waits for a grace period and then deletes the old one.
 */
#ifndef SOCKHOP_POLICY_H
#define SOCKHOP_POLICY_H

#define LOOPBACK4 bpf_htonl(0x7f000001)
#define FULL_NETWORK 160 /* bits of rules and address */
#define FULL_PORT 64 /* bits of class, protocol and port */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, ROOM);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policy_settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct policy_client);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policy_clients SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 131072);
	__type(key, struct policy_network);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policy_networks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 131072);
	__type(key, struct policy_port);
	__type(value, struct policy_verdict);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policy_ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, struct policy);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policies SEC(".maps");

/* For those who ask why. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct denial);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} denials SEC(".maps");

static __always_inline __u64 *policy_setting(__u32 which)
{
	return bpf_map_lookup_elem(&policy_settings, &which);
}

/* The rules of the deepest cgroup that any policy names. Without the cast, see clients.h, the agent
 * refuses policies for cgroups.
 */
static __always_inline __u32 *rules_of_cgroup(struct bpf_sock_addr *ctx,
					      struct policy_client *client)
{
	struct cgroup *cgroup, *ancestor;
	__u32 *rules = 0;
	int level, depth;

	if (!bpf_rdonly_cast)
		return 0;
	cgroup = BPF_CORE_READ(
		(struct sock *)bpf_rdonly_cast(ctx->sk, bpf_core_type_id_kernel(struct sock)),
		sk_cgrp_data.cgroup);
	level = BPF_CORE_READ(cgroup, level);
	for (depth = 0; depth < DEEPEST && !rules && level - depth >= 0; depth++) {
		ancestor = BPF_CORE_READ(cgroup, ancestors[level - depth]);
		client->cgroup = BPF_CORE_READ(ancestor, kn, id);
		rules = bpf_map_lookup_elem(&policy_clients, client);
	}
	return rules;
}

static __always_inline __u32 *rules_of(struct bpf_sock_addr *ctx, __u64 word)
{
	struct policy_client client = { .epoch = word >> 32 };
	__u32 *rules = 0;

	if (word & POLICY_NAMES_SPACES) {
		client.netns = bpf_get_netns_cookie(ctx);
		if (!bpf_map_lookup_elem(&policy_clients, &client))
			client.netns = 0;
	}
	if (word & POLICY_NAMES_CGROUPS)
		rules = rules_of_cgroup(ctx, &client);
	if (rules)
		return rules;
	client.cgroup = 0;
	return bpf_map_lookup_elem(&policy_clients, &client);
}

static __always_inline struct policy_verdict *verdict_on(const struct policy_network *network,
							 __u8 protocol, __u16 port)
{
	struct policy_port key = {};
	__u32 *class;

	/* An initializer would be a constant in .rodata without a name: 5.10 refuses such BTF. */
	key.prefixlen = FULL_PORT;
	class = bpf_map_lookup_elem(&policy_networks, network);
	if (!class)
		return 0;
	key.group = READ_ONCE(*class);
	if (protocol == IPPROTO_TCP || protocol == IPPROTO_UDP) {
		key.protocol = protocol;
		key.port = bpf_htons(port);
	}
	return bpf_map_lookup_elem(&policy_ports, &key);
}

static __always_inline int count_denied(const struct policy_verdict *verdict)
{
	__u32 id = READ_ONCE(verdict->policy);
	struct policy *policy = bpf_map_lookup_elem(&policies, &id);

	if (policy)
		add(&policy->denied, 1);
	return id;
}

#define LOST (-1)

/* The policy that denies it, or 0. Nothing is let through because a change is going on: what is not
 * found is denied. `to` has the address. It is not copied: a hook and what it calls have 512 bytes
 * of stack.
 */
static __always_inline int who_denies(struct bpf_sock_addr *ctx, struct policy_network *to,
				      __u16 port)
{
	__u64 *word = policy_setting(POLICY_WORD), *lost, now;
	struct policy_verdict *verdict;
	__u32 *rules;
	int attempt;

	for (attempt = 0; word && attempt < ATTEMPTS; attempt++) {
		now = READ_ONCE(*word);
		if (!now)
			return 0;
		rules = rules_of(ctx, now);
		if (!rules)
			continue;
		if (!READ_ONCE(*rules))
			return 0;
		to->prefixlen = FULL_NETWORK;
		to->rules = READ_ONCE(*rules);
		verdict = verdict_on(to, ctx->protocol, port);
		if (verdict)
			return READ_ONCE(verdict->denied) ? count_denied(verdict) : 0;
	}
	lost = policy_setting(POLICY_LOST);
	if (lost)
		add(lost, 1);
	return LOST;
}

/* To the unspecified address means to the socket's own, if it has one, else to the loopback one:
 * ip_route_output_key_hash_rcu() and tcp_v6_connect().
 */
static __always_inline int who_denies4(struct bpf_sock_addr *ctx, __be32 source)
{
	struct policy_network to = { .address = { 0, 0, MAPPED, ctx->user_ip4 } };

	if (!to.address[3]) {
		/* A connected socket that sends with control data: it has been let through. */
		if (!ctx->user_port)
			return 0;
		to.address[3] = source ?: LOOPBACK4;
	}
	return who_denies(ctx, &to, bpf_ntohs(ctx->user_port));
}

static __always_inline int who_denies6(struct bpf_sock_addr *ctx, const __be32 *source)
{
	struct policy_network to = { .address = { ctx->user_ip6[0], ctx->user_ip6[1],
						  ctx->user_ip6[2], ctx->user_ip6[3] } };
	__be32 *address = to.address;

	if (!address[0] && !address[1] && !address[2] && !address[3]) {
		if (!ctx->user_port)
			return 0;
		if (is_mapped(source)) {
			address[2] = MAPPED;
			address[3] = LOOPBACK4;
		} else {
			address[3] = bpf_htonl(1);
		}
	} else if (is_mapped(address) && !address[3]) {
		address[3] = is_mapped(source) && source[3] ? source[3] : LOOPBACK4;
	}
	return who_denies(ctx, &to, bpf_ntohs(ctx->user_port));
}

/* Functions of their own, which the verifier looks at once. */
__noinline int sockhop_denies_connect4(struct bpf_sock_addr *ctx)
{
	return who_denies4(ctx, ctx->sk ? ctx->sk->src_ip4 : 0);
}

__noinline int sockhop_denies_sendmsg4(struct bpf_sock_addr *ctx)
{
	return who_denies4(ctx, ctx->msg_src_ip4);
}

__noinline int sockhop_denies_connect6(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	__be32 source[4] = {};

	if (sk) {
		source[0] = READ_ONCE(sk->src_ip6[0]);
		source[1] = READ_ONCE(sk->src_ip6[1]);
		source[2] = READ_ONCE(sk->src_ip6[2]);
		source[3] = READ_ONCE(sk->src_ip6[3]);
	}
	return who_denies6(ctx, source);
}

__noinline int sockhop_denies_sendmsg6(struct bpf_sock_addr *ctx)
{
	__be32 source[4] = { ctx->msg_src_ip6[0], ctx->msg_src_ip6[1], ctx->msg_src_ip6[2],
			     ctx->msg_src_ip6[3] };

	return who_denies6(ctx, source);
}

static __always_inline int note(struct bpf_sock_addr *ctx, struct denial *denial, int who)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);

	denial->when = bpf_ktime_get_boot_ns();
	denial->netns = bpf_get_netns_cookie(ctx);
	denial->policy = who == LOST ? 0 : who;
	denial->pid = bpf_get_current_pid_tgid() >> 32;
	denial->port = bpf_ntohs(ctx->user_port);
	denial->protocol = ctx->protocol;
	bpf_map_update_elem(&denials, &cookie, denial, BPF_ANY);
	return 1;
}

/* Called by the hook, after who was asked: a function that is called calls no other one. */
__noinline int sockhop_note4(struct bpf_sock_addr *ctx, int who, __u8 datagram)
{
	struct denial denial = { .address = { 0, 0, MAPPED, ctx->user_ip4 }, .datagram = datagram };

	return note(ctx, &denial, who);
}

__noinline int sockhop_note6(struct bpf_sock_addr *ctx, int who, __u8 datagram)
{
	struct denial denial = { .address = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2],
					      ctx->user_ip6[3] },
				 .datagram = datagram };

	return note(ctx, &denial, who);
}

static __always_inline bool is_denied_connect4(struct bpf_sock_addr *ctx)
{
	int who = sockhop_denies_connect4(ctx);

	return who && sockhop_note4(ctx, who, 0);
}

static __always_inline bool is_denied_connect6(struct bpf_sock_addr *ctx)
{
	int who = sockhop_denies_connect6(ctx);

	return who && sockhop_note6(ctx, who, 0);
}

static __always_inline bool is_denied_sendmsg4(struct bpf_sock_addr *ctx)
{
	int who = sockhop_denies_sendmsg4(ctx);

	return who && sockhop_note4(ctx, who, 1);
}

static __always_inline bool is_denied_sendmsg6(struct bpf_sock_addr *ctx)
{
	int who = sockhop_denies_sendmsg6(ctx);

	return who && sockhop_note6(ctx, who, 1);
}

#endif /* SOCKHOP_POLICY_H */
