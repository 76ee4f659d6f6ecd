/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Keys and values of the pinned maps: the only ABI between the datapath and Python, which checks
 * each struct against this file's BTF when it loads an object.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. Ports are in host order.
 */
#ifndef SOCKHOP_H
#define SOCKHOP_H

/* Changes when a pinned map of an older version can no longer be used as it is. */
#define SOCKHOP_ABI 1

enum setting {
	SETTING_ABI, /* SOCKHOP_ABI of whoever made the maps */
	SETTING_BYPASS, /* not 0: every hook lets everything pass */
	SETTING_GENERATION, /* the latest generation: each change of the installed state has one */
	SETTING_NEXT_SERVICE, /* ids are never given twice, live sockets may still name the old */
	SETTING_NEXT_BACKEND,
	SETTING_FALLBACK, /* not 0: provenance_by_cookie has been used */
	SETTINGS,
};

/* netns: 0 for everywhere, else the cookie of the one network namespace where it holds. */
struct frontend_key {
	__be32 address[4];
	__u64 netns;
	__u16 port;
	__u8 protocol;
	__u8 pad[5];
};

enum frontend_flag {
	FRONTEND_SCOPED = 1, /* ask again with the netns cookie; what that finds wins */
	FRONTEND_ABSENT = 2, /* where the scoped one is not found: not a service */
};

struct frontend {
	struct frontend_key key;
	__u32 id; /* index of its word and its counters */
	__u32 service;
	__u8 type;
	__u8 flags;
	__u8 pad[6];
};

/* The service word, one u64 so that a reader sees a whole one: generation << 32 | count. */
#define WORD_GENERATION(word) ((__u32)((word) >> 32))
#define WORD_COUNT(word) ((__u32)(word))

struct slot_key {
	__u32 frontend;
	__u32 generation;
	__u32 position;
};

/* One backend of one generation, with its share of Vose's alias table: the slot itself is taken
 * when a random u32 is at most `keep`, else the slot at position `alias`.
 */
struct slot {
	struct slot_key key;
	__u32 backend;
	__be32 address[4];
	__u32 keep;
	__u32 alias;
	__u16 port;
	__u16 weight;
	__u8 state;
	__u8 pad[3];
};

/* A backend of one service, by its id. One that left and came back has another id. */
struct backend {
	__u32 service;
	__be32 address[4];
	__u16 port;
	__u16 weight;
	__u8 protocol;
	__u8 state;
};

struct service {
	char name[128];
};

struct counters {
	__u64 connects;
	__u64 no_backend;
};

enum total {
	TOTAL_STORAGE_FAILED, /* sk_storage refused: provenance went to provenance_by_cookie */
	TOTAL_LIVE_FULL, /* the live index is full: its namespace is always visited */
	TOTAL_RETRIES, /* a reader met a change of the service and read again */
	TOTAL_EXHAUSTED, /* ... four times: the connect was refused */
	TOTALS,
};

/* How many live sockets a namespace has on a backend; never below the truth. */
struct live_key {
	__u64 netns;
	__u32 service;
	__u32 backend;
};

enum provenance_flag {
	PROVENANCE_COUNTED = 1, /* it is in the live index */
};

/* What the kernel remembers of a balanced socket. Frozen: programs of different versions share it. */
struct provenance {
	__be32 frontend_address[4];
	__be32 backend_address[4];
	__be32 previous_address[4]; /* the backend before a resteer */
	__u64 since; /* CLOCK_BOOTTIME, ns */
	__u64 netns; /* cookie */
	__u32 service;
	__u32 frontend;
	__u32 backend; /* 0: the socket is not balanced now */
	__u32 generation;
	__u16 frontend_port;
	__u16 backend_port;
	__u16 previous_port;
	__u8 protocol;
	__u8 flags;
	__u64 reserved;
};

/* What the iterator of sockets.bpf.c writes. */
struct socket_record {
	struct provenance provenance;
	__be32 local_address[4];
	__be32 remote_address[4];
	__u64 cookie;
	__u64 inode; /* 0: no process holds it */
	__u32 netns_inode;
	__u16 local_port;
	__u16 remote_port;
	__u16 family;
	__u8 state;
	__u8 pad[5];
};

#endif /* SOCKHOP_H */
