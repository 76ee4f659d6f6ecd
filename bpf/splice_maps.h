/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The pinned maps of splicing, and what its two objects share. */
#ifndef SOCKHOP_SPLICE_MAPS_H
#define SOCKHOP_SPLICE_MAPS_H

#define SPLICE_HANDSHAKES 16384

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, ROOM);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} splice_settings SEC(".maps");

/* By the id of the service that a client dialled. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct splice_policy);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} splice_services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct splice_place);
	__type(value, struct splice_policy);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} splice_places SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct splice_owner);
	__type(value, struct splice_policy);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} splice_owners SEC(".maps");

/* Handshakes under way, by a hash of the tuple: first a mark that the server's end is opted in, then
 * the number of the pair. Two of them may have the same place; the loser goes by the stack.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SPLICE_HANDSHAKES);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} splice_handshakes SEC(".maps");

/* LRU: where a socket's end was not seen, its entry goes one day. A pair that loses its entry goes
 * on by the stack.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, struct splice_pair);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} splice_pairs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __s32);
	__type(value, struct splice_lane);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} splice_lanes SEC(".maps");

/* By the socket's own cookie, never by a tuple: a stale entry is then in nobody's way. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} splice_sockets SEC(".maps");

/* By the id of the service, 0 for what was opted in otherwise. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct splice_counters);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} splice_counters SEC(".maps");

/* A service without counters (the map is full) is not counted. */
static __always_inline struct splice_counters *counters_of(__u32 service)
{
	return bpf_map_lookup_elem(&splice_counters, &service);
}

/* Looking counters up for each message would cost as much as all the rest. */
static __always_inline void count_spliced(struct splice_lane *lane)
{
	struct splice_counters *counters = counters_of(lane->service);
	__u64 bytes = __sync_lock_test_and_set(&lane->uncounted, 0);

	if (counters && bytes)
		add(&counters->spliced_bytes, bytes);
}

/* Whether splicing is switched off, for all sockets at once. */
static __always_inline bool switched_off(void)
{
	__u32 bypass = SETTING_BYPASS, off = SPLICE_OFF;
	__u64 *set = bpf_map_lookup_elem(&settings, &bypass);

	if (set && *set)
		return true;
	set = bpf_map_lookup_elem(&splice_settings, &off);
	return set && *set;
}

/* A socket's queue of spliced bytes, 0 without one. The lower bits of the pointer are tags:
 * SK_USER_DATA_PTRMASK (include/net/sock.h).
 */
static __always_inline struct sk_psock *psock_of(const struct sock *sk)
{
	return (struct sk_psock *)((__u64)BPF_CORE_READ(sk, sk_user_data) & ~7ULL);
}

static __always_inline bool queue_is_empty(struct sk_psock *psock)
{
	struct list_head *head = __builtin_preserve_access_index(&psock->ingress_msg);

	return BPF_CORE_READ(psock, ingress_msg.next) == head;
}

#endif /* SOCKHOP_SPLICE_MAPS_H */
