/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* From an address that was dialled to the backend that serves it.
 *
 * A change of a service is atomic for readers. The word of a frontend names a generation; slots
 * are found by (frontend, generation, position). The agent writes the slots of a new generation,
 * stores the word, waits for a grace period and only then deletes the old slots. Elements of a
 * BPF hash are reused as soon as they are deleted, under a reader's feet (kernel/bpf/hashtab.c),
 * so every value repeats its key, is copied before that key is compared, and a reader that finds
 * another key starts again from the word.
 */
#ifndef SOCKHOP_CHOOSE_H
#define SOCKHOP_CHOOSE_H

#define ATTEMPTS 4
#define KEEP_ALWAYS 0xffffffff
#define SECOND 1000000000ULL

static __always_inline __u64 setting(__u32 which)
{
	__u64 *value = bpf_map_lookup_elem(&settings, &which);

	return value ? READ_ONCE(*value) : 0;
}

static __always_inline void count(__u32 which)
{
	__u64 *value = bpf_map_lookup_elem(&totals, &which);

	if (value)
		add(value, 1);
}

/* `copy` stays as it was where there is no such frontend: that of a namespace may go while it is
 * read, and then the general one holds.
 */
static __always_inline bool read_frontend(const struct frontend_key *key, struct frontend *copy)
{
	__u32 id, service, affinity;
	struct frontend *found;
	int attempt;
	__u8 flags;

	for (attempt = 0; attempt < ATTEMPTS; attempt++) {
		found = bpf_map_lookup_elem(&frontends, key);
		if (!found)
			return false;
		id = READ_ONCE(found->id);
		service = READ_ONCE(found->service);
		affinity = READ_ONCE(found->affinity);
		flags = READ_ONCE(found->flags);
		if (same_address(found->key.address, key->address) &&
		    READ_ONCE(found->key.netns) == key->netns &&
		    READ_ONCE(found->key.port) == key->port &&
		    READ_ONCE(found->key.protocol) == key->protocol &&
		    READ_ONCE(found->key.layer) == key->layer) {
			copy->id = id;
			copy->service = service;
			copy->affinity = affinity;
			copy->flags = flags;
			return true;
		}
		count(TOTAL_RETRIES);
	}
	count(TOTAL_EXHAUSTED);
	return false;
}

/* ctx is a bpf_sock_addr or a bpf_sock. */
static __always_inline bool find_frontend(void *ctx, struct frontend_key *key,
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
	copy->key = *key;
	copy->backend = READ_ONCE(found->backend);
	copy->address[0] = READ_ONCE(found->address[0]);
	copy->address[1] = READ_ONCE(found->address[1]);
	copy->address[2] = READ_ONCE(found->address[2]);
	copy->address[3] = READ_ONCE(found->address[3]);
	copy->port = READ_ONCE(found->port);
	copy->weight = READ_ONCE(found->weight);
	copy->state = READ_ONCE(found->state);
	copy->keep = READ_ONCE(found->keep);
	copy->alias = READ_ONCE(found->alias);
	return READ_ONCE(found->key.frontend) == key->frontend &&
	       READ_ONCE(found->key.generation) == key->generation &&
	       READ_ONCE(found->key.position) == key->position;
}

/* The high half of random * n is a fair number below n, without a division. */
static __always_inline __u32 below(__u32 random, __u32 n)
{
	return ((__u64)random * n) >> 32;
}

static __always_inline bool choose_weighted(struct slot_key *key, __u32 n, struct slot *chosen)
{
	key->position = below(bpf_get_prandom_u32(), n);
	if (!read_slot(key, chosen))
		return false;
	if (chosen->keep == KEEP_ALWAYS || bpf_get_prandom_u32() <= chosen->keep)
		return true;
	key->position = chosen->alias;
	return read_slot(key, chosen);
}

static __always_inline bool choose_from_table(struct slot_key *key, __u32 entry,
					      struct slot *chosen)
{
	struct table_block *block;
	__u32 offset = entry & (BLOCK_ENTRIES - 1);

	key->position = entry / BLOCK_ENTRIES;
	block = bpf_map_lookup_elem(&tables, key);
	if (!block)
		return false;
	entry = READ_ONCE(block->entries[offset]);
	if (READ_ONCE(block->key.frontend) != key->frontend ||
	    READ_ONCE(block->key.generation) != key->generation ||
	    READ_ONCE(block->key.position) != key->position)
		return false;
	key->position = entry;
	return read_slot(key, chosen);
}

static __always_inline __u64 load_of(__u32 backend)
{
	__u64 *n = bpf_map_lookup_elem(&loads, &backend);

	return n ? READ_ONCE(*n) : 0;
}

/* The power of two choices: M. Mitzenmacher, IEEE TPDS 12 (10), 2001. */
static __always_inline bool choose_less_loaded(struct slot_key *key, __u32 n, struct slot *chosen)
{
	struct slot other = {};

	if (!choose_weighted(key, n, chosen) || !choose_weighted(key, n, &other))
		return false;
	/* load / weight, without the division */
	if (load_of(other.backend) * chosen->weight < load_of(chosen->backend) * other.weight)
		*chosen = other;
	return true;
}

/* What is known of a flow before it has a source port: what the socket was bound to, else chance. */
static __always_inline __u32 flow_hash(struct bpf_sock_addr *ctx)
{
	__u64 flow = bpf_get_socket_cookie(ctx);

	if (ctx->sk->src_port)
		flow = (__u64)ctx->sk->src_ip4 << 16 | ctx->sk->src_port;
	return (flow * 0x9e3779b97f4a7c15ULL) >> 32;
}

static __always_inline bool choose_by(struct bpf_sock_addr *ctx, __u64 word, __u64 turn,
				      struct slot_key *key, struct slot *chosen)
{
	__u32 n = WORD_COUNT(word);

	switch (WORD_ALGORITHM(word)) {
	case ALGORITHM_ROUND_ROBIN:
		return choose_from_table(key, turn % n, chosen);
	case ALGORITHM_MAGLEV:
		return choose_from_table(key, below(flow_hash(ctx), n), chosen);
	case ALGORITHM_LEAST_CONNECTIONS:
		return choose_less_loaded(key, n, chosen);
	default:
		return choose_weighted(key, n, chosen);
	}
}

struct choice {
	struct slot slot; /* its backend, address and port */
	__u32 generation;
	__u8 reason;
	__u8 load; /* count it in the load of the backend */
};

/* Whether a backend that a client or a socket has been given before may be given again: it is in
 * the state that serves, and still in the service. `weight`: the least that it must have.
 */
static __always_inline bool serves(__u32 id, __u32 service, __u8 state, __u16 weight,
				   struct slot *chosen)
{
	struct backend *found = bpf_map_lookup_elem(&backends, &id), now;

	if (!found || READ_ONCE(found->state) != state || READ_ONCE(found->service) != service ||
	    READ_ONCE(found->weight) < weight)
		return false;
	now.address[0] = READ_ONCE(found->address[0]);
	now.address[1] = READ_ONCE(found->address[1]);
	now.address[2] = READ_ONCE(found->address[2]);
	now.address[3] = READ_ONCE(found->address[3]);
	now.port = READ_ONCE(found->port);
	if (READ_ONCE(found->id) != id)
		return false;
	chosen->backend = id;
	copy_address(chosen->address, now.address);
	chosen->port = now.port;
	chosen->state = state;
	return true;
}

/* The backend that a client has had in the last seconds; 0 for none. */
static __always_inline __u32 affine_backend(const struct affinity_key *client, __u32 seconds)
{
	struct affinity *last = bpf_map_lookup_elem(&affinities, client);

	if (!last || bpf_ktime_get_boot_ns() - READ_ONCE(last->seen) >= seconds * SECOND)
		return 0;
	return READ_ONCE(last->backend);
}

static __always_inline bool choose_anew(struct bpf_sock_addr *ctx, __u32 frontend, __u64 *word,
					__u64 turn, struct choice *choice)
{
	struct slot_key key = { .frontend = frontend };
	int attempt;
	__u64 now;

	for (attempt = 0; attempt < ATTEMPTS; attempt++) {
		now = READ_ONCE(*word);
		if (!WORD_COUNT(now))
			return false;
		key.generation = WORD_GENERATION(now);
		if (choose_by(ctx, now, turn, &key, &choice->slot)) {
			choice->generation = key.generation;
			choice->reason = WORD_ALGORITHM(now);
			return true;
		}
		count(TOTAL_RETRIES);
	}
	count(TOTAL_EXHAUSTED);
	return false;
}

/* Returns whether a backend can serve. */
static __always_inline bool choose(struct bpf_sock_addr *ctx, const struct frontend *frontend,
				   struct choice *choice)
{
	struct affinity_key client = { .netns = 0, .frontend = frontend->id };
	struct counters *n = bpf_map_lookup_elem(&counters, &frontend->id);
	__u64 *word = bpf_map_lookup_elem(&words, &frontend->id);
	struct affinity now;
	bool again = false;
	__u32 last = 0;

	if (!n || !word)
		return false;
	if (frontend->affinity) {
		client.netns = bpf_get_netns_cookie(ctx);
		last = affine_backend(&client, frontend->affinity);
		again = serves(last, frontend->service, BACKEND_ACTIVE, 1, &choice->slot);
	}
	if (!again) {
		if (!choose_anew(ctx, frontend->id, word, READ_ONCE(n->connects), choice))
			return false;
		/* None is active: those that serve instead keep their clients, too. */
		again = choice->slot.state != BACKEND_ACTIVE &&
			serves(last, frontend->service, choice->slot.state, 1, &choice->slot);
	}
	if (again) {
		choice->generation = WORD_GENERATION(READ_ONCE(*word));
		choice->reason = REASON_AFFINITY;
	}
	choice->load = WORD_ALGORITHM(READ_ONCE(*word)) == ALGORITHM_LEAST_CONNECTIONS;
	if (frontend->affinity) {
		__builtin_memset(&now, 0, sizeof(now));
		now.seen = bpf_ktime_get_boot_ns();
		now.backend = choice->slot.backend;
		bpf_map_update_elem(&affinities, &client, &now, BPF_ANY);
	}
	return true;
}

/* The backend that somebody else has chosen for this socket, if it serves. */
static __always_inline bool choose_named(const struct frontend *frontend, __u32 id,
					 struct choice *choice)
{
	__u64 *word = bpf_map_lookup_elem(&words, &frontend->id), now = word ? READ_ONCE(*word) : 0;

	choice->generation = WORD_GENERATION(now);
	choice->load = WORD_ALGORITHM(now) == ALGORITHM_LEAST_CONNECTIONS;
	return serves(id, frontend->service, BACKEND_ACTIVE, 1, &choice->slot);
}

/* A backend by chance and weight, whatever the algorithm. */
static __always_inline bool choose_other(const struct frontend *frontend, struct slot *other)
{
	__u64 *word = bpf_map_lookup_elem(&words, &frontend->id), now = word ? READ_ONCE(*word) : 0;
	struct slot_key key = {
		.frontend = frontend->id,
		.generation = WORD_GENERATION(now),
	};

	switch (WORD_ALGORITHM(now)) {
	case ALGORITHM_ROUND_ROBIN:
	case ALGORITHM_MAGLEV:
		return choose_from_table(&key, below(bpf_get_prandom_u32(), WORD_COUNT(now)),
					 other);
	default:
		return choose_weighted(&key, WORD_COUNT(now), other);
	}
}

enum verdict {
	PASS,
	NO_BACKEND,
	BALANCED,
	TOO_LATE, /* to move the socket */
	PUT_BACK, /* the socket that was moved: to where its program has connected it meanwhile */
};

static __always_inline enum verdict counted(const struct frontend *frontend, enum verdict verdict)
{
	struct counters *n = bpf_map_lookup_elem(&counters, &frontend->id);

	if (verdict == NO_BACKEND)
		count(TOTAL_REJECTED);
	if (n)
		add(verdict == BALANCED ? &n->connects : &n->no_backend, 1);
	return verdict;
}

#endif /* SOCKHOP_CHOOSE_H */
