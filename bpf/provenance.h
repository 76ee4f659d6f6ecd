/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What the kernel remembers of a balanced socket, and where the socket is counted. */
#ifndef SOCKHOP_PROVENANCE_H
#define SOCKHOP_PROVENANCE_H

#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))

/* One branch, not four: the verifier walks all of them. */
static __always_inline bool same_address(const __be32 *a, const __be32 *b)
{
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]));
}

static __always_inline void copy_address(__be32 *to, const __be32 *from)
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

/* With the result unused this is a plain locked add, which 5.10 has. */
static __always_inline void add(__u64 *value, __s64 n)
{
	__atomic_fetch_add(value, n, __ATOMIC_RELAXED);
}

/* Two programs may uncount a socket at once, a hook and the iterator that reconciles: who takes the
 * bits subtracts. `since` and `backend` name the connect that was counted.
 */
#ifndef PLAIN

/* Linux kernel commits 5ffa25502b5a ("bpf: Add instructions for atomic_[cmp]xchg") and 981f94c3e921
 * ("bpf: Add bitwise atomic instructions") (in v5.12).
 */
static __always_inline __u32 take(__u32 *counted, __u64 since, __u32 backend)
{
	return __sync_fetch_and_and(counted, ~COUNTED_BITS) & COUNTED_BITS;
}

/* Takes the bits that a reader has seen in *counted, unless the socket has connected since. */
static __always_inline __u32 take_seen(__u32 *counted, __u32 seen, __u64 since, __u32 backend)
{
	if (__sync_val_compare_and_swap(counted, seen, seen & ~COUNTED_BITS) != seen)
		return 0;
	return seen & COUNTED_BITS;
}

#else /* for kernels without: who is first to note it in a map */

struct taking {
	__u64 since;
	__u32 backend;
	__u32 counted;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384); /* each matters for an instant only */
	__type(key, struct taking);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} takings SEC(".maps");

/* Two sockets that connect to one backend in the same nanosecond have one key: then one of them
 * stays counted. A count may be too high, never too low. With a stack of its own: that of connect6
 * is full.
 */
static __noinline __u32 first_to_take(__u64 since, __u32 backend, __u32 counted)
{
	struct taking key = { .since = since, .backend = backend, .counted = counted };
	__u32 one = 1;

	return bpf_map_update_elem(&takings, &key, &one, BPF_NOEXIST) ? 0 : counted & COUNTED_BITS;
}

static __always_inline void clear(__u32 *counted, __u32 seen)
{
	*(volatile __u32 *)counted = seen & ~COUNTED_BITS;
}

/* Hooks of one socket never run at once: only the iterator may come between. */
static __always_inline __u32 take(__u32 *counted, __u64 since, __u32 backend)
{
	__u32 seen = READ_ONCE(*counted);

	if (!(seen & COUNTED_BITS))
		return 0;
	clear(counted, seen);
	return first_to_take(since, backend, seen);
}

/* A connect in the last instant may find its bits cleared, and stays counted. */
static __always_inline __u32 take_seen(__u32 *counted, __u32 seen, __u64 since, __u32 backend)
{
	if (!(seen & COUNTED_BITS) || !first_to_take(since, backend, seen))
		return 0;
	if (READ_ONCE(*counted) == seen)
		clear(counted, seen);
	return seen & COUNTED_BITS;
}

#endif

static __always_inline void uncount_key(const struct live_key *key, __u32 bits)
{
	__u64 *n;

	if (bits & COUNTED_LIVE) {
		n = bpf_map_lookup_elem(&live, key);
		if (n)
			add(n, -1);
	}
	if (bits & COUNTED_LOAD) {
		n = bpf_map_lookup_elem(&loads, &key->backend);
		if (n)
			add(n, -1);
	}
}

/* One of the two keys under which a socket may be counted. */
static __always_inline struct live_key key_of(const struct provenance *p)
{
	return (struct live_key){ .netns = p->netns, .service = p->service, .backend = p->backend };
}

static __always_inline struct live_key previous_key_of(const struct provenance *p)
{
	return (struct live_key){ .netns = p->netns,
				  .service = p->previous_service,
				  .backend = p->previous_backend };
}

static __always_inline void uncount(struct provenance *p)
{
	struct live_key key = key_of(p);

	if (p->counted & COUNTED_BITS)
		uncount_key(&key, take(&p->counted, p->since, p->backend));
}

static __always_inline void uncount_previous(struct provenance *p)
{
	struct live_key key = previous_key_of(p);

	if (p->previous_counted & COUNTED_BITS)
		uncount_key(&key, take(&p->previous_counted, p->since, p->previous_backend));
}

#endif /* SOCKHOP_PROVENANCE_H */
