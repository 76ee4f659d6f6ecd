/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The pinned maps that several objects share. */
#ifndef SOCKHOP_MAPS_H
#define SOCKHOP_MAPS_H

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, ROOM);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __s32);
	__type(value, struct provenance);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} provenance SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct live_key);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} live SEC(".maps");

/* Sockets of all namespaces on a backend, for least-connections. The agent makes the entries. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} loads SEC(".maps");

/* For sockets whose sk_storage is refused (net.core.optmem_max). */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, struct provenance);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} provenance_by_cookie SEC(".maps");

#endif /* SOCKHOP_MAPS_H */
