// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Balance: a connect() to a frontend becomes a connect() to one of its backends.
 *
 * A change of a service is atomic for readers. The word of a frontend names a generation; slots
 * are found by (frontend, generation, position). The agent writes the slots of a new generation,
 * stores the word, waits for a grace period and only then deletes the old slots. Elements of a
 * BPF hash are reused as soon as they are deleted, under a reader's feet (kernel/bpf/hashtab.c),
 * so every value repeats its key, is copied before that key is compared, and a reader that finds
 * another key starts again from the word.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "sockhop.h"
#include "maps.h"

#define ATTEMPTS 4
#define EHOSTUNREACH 113
#define ALLOW 1
#define REJECT 0

#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SETTINGS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 131072);
	__type(key, struct frontend_key);
	__type(value, struct frontend);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} frontends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 131072);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} words SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 524288);
	__type(key, struct slot_key);
	__type(value, struct slot);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} slots SEC(".maps");

/* Read by Python only: names and states that no connect needs. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, __u32);
	__type(value, struct backend);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} backends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 131072);
	__type(key, __u32);
	__type(value, struct service);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 131072);
	__type(key, __u32);
	__type(value, struct counters);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, TOTALS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} totals SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct live_key);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} live SEC(".maps");

/* For sockets whose sk_storage is refused (net.core.optmem_max). */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, struct provenance);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} provenance_by_cookie SEC(".maps");

static __always_inline __u64 setting(__u32 which)
{
	__u64 *value = bpf_map_lookup_elem(&settings, &which);

	return value ? READ_ONCE(*value) : 0;
}

/* With the result unused this is a plain locked add, which 5.10 has. */
static __always_inline void add(__u64 *value, __s64 n)
{
	__atomic_fetch_add(value, n, __ATOMIC_RELAXED);
}

static __always_inline void count(__u32 which)
{
	__u64 *value = bpf_map_lookup_elem(&totals, &which);

	if (value)
		add(value, 1);
}

static __always_inline bool same_address(const __be32 *a, const __be32 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

static __always_inline void copy_address(__be32 *to, const __be32 *from)
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

/* --- the live index ------------------------------------------------------------------------ */

static __always_inline __u64 *live_count(const struct provenance *p, bool create)
{
	struct live_key key = { .netns = p->netns, .service = p->service, .backend = p->backend };
	__u64 *n = bpf_map_lookup_elem(&live, &key);
	__u64 zero = 0;

	if (n || !create)
		return n;
	/* Two CPUs may come here at once: neither may overwrite the other's count. */
	bpf_map_update_elem(&live, &key, &zero, BPF_NOEXIST);
	return bpf_map_lookup_elem(&live, &key);
}

static __always_inline void live_insert(struct provenance *p)
{
	__u64 *n = live_count(p, true);

	if (!n) {
		count(TOTAL_LIVE_FULL);
		return;
	}
	add(n, 1);
	p->flags |= PROVENANCE_COUNTED;
}

static __always_inline void live_remove(struct provenance *p)
{
	__u64 *n;

	if (!(p->flags & PROVENANCE_COUNTED))
		return;
	p->flags &= ~PROVENANCE_COUNTED;
	n = live_count(p, false);
	if (n)
		add(n, -1);
}

/* --- provenance ---------------------------------------------------------------------------- */

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

static __always_inline void remember(struct bpf_sock_addr *ctx, struct provenance *fresh)
{
	/* Asking for the cookie makes it: from now on every tool can name this socket. */
	__u64 cookie = bpf_get_socket_cookie(ctx), one = 1;
	__u32 which = SETTING_FALLBACK;

	if (bpf_sk_storage_get(&provenance, ctx->sk, fresh, BPF_SK_STORAGE_GET_F_CREATE))
		return;
	count(TOTAL_STORAGE_FAILED);
	bpf_map_update_elem(&provenance_by_cookie, &cookie, fresh, BPF_ANY);
	bpf_map_update_elem(&settings, &which, &one, BPF_ANY);
}

/* The socket leaves the backend that it was given. */
static __always_inline void forget(struct provenance *p)
{
	if (!p)
		return;
	live_remove(p);
	p->backend = 0;
}

/* --- from a frontend to a backend ---------------------------------------------------------- */

static __always_inline bool read_frontend(const struct frontend_key *key, struct frontend *copy)
{
	struct frontend *found;
	int attempt;

	for (attempt = 0; attempt < ATTEMPTS; attempt++) {
		found = bpf_map_lookup_elem(&frontends, key);
		if (!found)
			return false;
		copy->id = READ_ONCE(found->id);
		copy->service = READ_ONCE(found->service);
		copy->flags = READ_ONCE(found->flags);
		if (same_address(found->key.address, key->address) &&
		    READ_ONCE(found->key.netns) == key->netns &&
		    READ_ONCE(found->key.port) == key->port &&
		    READ_ONCE(found->key.protocol) == key->protocol)
			return true;
		count(TOTAL_RETRIES);
	}
	count(TOTAL_EXHAUSTED);
	return false;
}

static __always_inline bool find_frontend(struct bpf_sock_addr *ctx, struct frontend_key *key,
					  struct frontend *found)
{
	if (!read_frontend(key, found))
		return false;
	if (!(found->flags & FRONTEND_SCOPED))
		return true;
	key->netns = bpf_get_netns_cookie(ctx);
	return read_frontend(key, found) || !(found->flags & FRONTEND_ABSENT);
}

static __always_inline bool read_slot(const struct slot_key *key, struct slot *copy)
{
	struct slot *found = bpf_map_lookup_elem(&slots, key);

	if (!found)
		return false;
	copy->backend = READ_ONCE(found->backend);
	copy->address[0] = READ_ONCE(found->address[0]);
	copy->address[1] = READ_ONCE(found->address[1]);
	copy->address[2] = READ_ONCE(found->address[2]);
	copy->address[3] = READ_ONCE(found->address[3]);
	copy->port = READ_ONCE(found->port);
	copy->keep = READ_ONCE(found->keep);
	copy->alias = READ_ONCE(found->alias);
	return READ_ONCE(found->key.frontend) == key->frontend &&
	       READ_ONCE(found->key.generation) == key->generation &&
	       READ_ONCE(found->key.position) == key->position;
}

static __always_inline bool choose_weighted(struct slot_key *key, __u32 backends,
					    struct slot *chosen)
{
	/* The high half of random * n is a fair index without a division. */
	key->position = ((__u64)bpf_get_prandom_u32() * backends) >> 32;
	if (!read_slot(key, chosen))
		return false;
	if (bpf_get_prandom_u32() <= chosen->keep)
		return true;
	key->position = chosen->alias;
	return read_slot(key, chosen);
}

/* Returns the generation that was used, 0 where no backend can serve. */
static __always_inline __u32 choose(__u32 frontend, struct slot *chosen)
{
	__u64 *word = bpf_map_lookup_elem(&words, &frontend), now;
	struct slot_key key = { .frontend = frontend };
	int attempt;

	if (!word)
		return 0;
	for (attempt = 0; attempt < ATTEMPTS; attempt++) {
		now = READ_ONCE(*word);
		if (!WORD_COUNT(now))
			return 0;
		key.generation = WORD_GENERATION(now);
		if (choose_weighted(&key, WORD_COUNT(now), chosen))
			return key.generation;
		count(TOTAL_RETRIES);
	}
	count(TOTAL_EXHAUSTED);
	return 0;
}

static __always_inline int unreachable(void)
{
	/* Linux kernel commit b44123b4a3dc ("bpf: Add cgroup helpers bpf_{get,set}_retval to
	 * get/set syscall return value") (in v5.18). Before it: EPERM.
	 */
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_set_retval))
		bpf_set_retval(-EHOSTUNREACH);
	return REJECT;
}

enum verdict {
	PASS,
	NO_BACKEND,
	BALANCED,
};

/* Where key is a frontend: choose, remember why, and leave the backend in *chosen. */
static __always_inline enum verdict balance(struct bpf_sock_addr *ctx, struct frontend_key *key,
					    struct slot *chosen)
{
	struct provenance fresh = {}, *old = recall(ctx, ctx->sk);
	struct frontend frontend = {};
	struct counters *n;

	if (!find_frontend(ctx, key, &frontend)) {
		forget(old);
		return PASS;
	}
	n = bpf_map_lookup_elem(&counters, &frontend.id);
	fresh.generation = choose(frontend.id, chosen);
	if (!fresh.generation) {
		/* A connected UDP socket stays where it is, and so does its provenance. */
		if (n)
			add(&n->no_backend, 1);
		return NO_BACKEND;
	}
	forget(old);
	copy_address(fresh.frontend_address, key->address);
	copy_address(fresh.backend_address, chosen->address);
	fresh.since = bpf_ktime_get_boot_ns();
	fresh.netns = bpf_get_netns_cookie(ctx);
	fresh.service = frontend.service;
	fresh.frontend = frontend.id;
	fresh.backend = chosen->backend;
	fresh.frontend_port = key->port;
	fresh.backend_port = chosen->port;
	fresh.protocol = key->protocol;
	live_insert(&fresh);
	if (old)
		*old = fresh;
	else
		remember(ctx, &fresh);
	if (n)
		add(&n->connects, 1);
	return BALANCED;
}

/* --- hooks --------------------------------------------------------------------------------- */

#define MAPPED bpf_htonl(0xffff)

static __always_inline bool is_mapped(const __be32 *address)
{
	return !address[0] && !address[1] && address[2] == MAPPED;
}

SEC("cgroup/connect4")
int sockhop_connect4(struct bpf_sock_addr *ctx)
{
	struct frontend_key key = {
		.address = { 0, 0, MAPPED, ctx->user_ip4 },
		.port = bpf_ntohs(ctx->user_port),
		.protocol = ctx->protocol,
	};
	struct slot chosen = {};

	if (setting(SETTING_BYPASS))
		return ALLOW;
	switch (balance(ctx, &key, &chosen)) {
	case NO_BACKEND:
		return unreachable();
	case BALANCED:
		ctx->user_ip4 = chosen.address[3];
		ctx->user_port = bpf_htons(chosen.port);
	default:
		return ALLOW;
	}
}

SEC("cgroup/connect6")
int sockhop_connect6(struct bpf_sock_addr *ctx)
{
	struct frontend_key key = {
		.address = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2],
			     ctx->user_ip6[3] },
		.port = bpf_ntohs(ctx->user_port),
		.protocol = ctx->protocol,
	};
	struct slot chosen = {};

	if (setting(SETTING_BYPASS))
		return ALLOW;
	switch (balance(ctx, &key, &chosen)) {
	case NO_BACKEND:
		return unreachable();
	case BALANCED:
		ctx->user_ip6[0] = chosen.address[0];
		ctx->user_ip6[1] = chosen.address[1];
		ctx->user_ip6[2] = chosen.address[2];
		ctx->user_ip6[3] = chosen.address[3];
		ctx->user_port = bpf_htons(chosen.port);
	default:
		return ALLOW;
	}
}

/* The frontend of a socket whose peer is still the backend that it was given. */
static __always_inline const struct provenance *dialled(struct bpf_sock_addr *ctx,
							const __be32 *peer)
{
	const struct provenance *p;

	if (setting(SETTING_BYPASS))
		return 0;
	p = recall(ctx, ctx->sk);
	if (!p || !p->backend || p->backend_port != bpf_ntohs(ctx->user_port) ||
	    !same_address(p->backend_address, peer))
		return 0;
	return p;
}

SEC("cgroup/getpeername4")
int sockhop_getpeername4(struct bpf_sock_addr *ctx)
{
	__be32 peer[4] = { 0, 0, MAPPED, ctx->user_ip4 };
	const struct provenance *p = dialled(ctx, peer);

	if (p && is_mapped(p->frontend_address)) {
		ctx->user_ip4 = p->frontend_address[3];
		ctx->user_port = bpf_htons(p->frontend_port);
	}
	return ALLOW;
}

SEC("cgroup/getpeername6")
int sockhop_getpeername6(struct bpf_sock_addr *ctx)
{
	__be32 peer[4] = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] };
	const struct provenance *p = dialled(ctx, peer);

	if (p) {
		ctx->user_ip6[0] = p->frontend_address[0];
		ctx->user_ip6[1] = p->frontend_address[1];
		ctx->user_ip6[2] = p->frontend_address[2];
		ctx->user_ip6[3] = p->frontend_address[3];
		ctx->user_port = bpf_htons(p->frontend_port);
	}
	return ALLOW;
}

/* Runs at close(); in bypass too, since it only counts. */
SEC("cgroup/sock_release")
int sockhop_sock_release(struct bpf_sock *sk)
{
	struct provenance *p = recall(sk, sk);

	if (p)
		live_remove(p);
	return ALLOW;
}

char LICENSE[] SEC("license") = "GPL";
