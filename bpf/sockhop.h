/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Keys and values of the pinned maps: the only ABI between the datapath and Python, which checks
 * each struct against this file's BTF when it loads an object.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. Ports are in host order.
 */
#ifndef SOCKHOP_H
#define SOCKHOP_H

/* Changes when a pinned map of an older version can no longer be used as it is: another key or
 * value, or fewer entries than there are now. tests/kernel/test_abi.py notices.
 */
#define SOCKHOP_ABI 2

/* Entries of arrays that are indexed by an enum: a new one needs no new map. */
#define ROOM 64

enum setting {
	SETTING_ABI, /* SOCKHOP_ABI of whoever made the maps */
	SETTING_BYPASS, /* not 0: every hook lets everything pass */
	SETTING_GENERATION, /* the latest generation: each change of the installed state has one */
	SETTING_NEXT_SERVICE, /* ids are never given twice, live sockets may still name the old */
	SETTING_NEXT_BACKEND,
	SETTING_FALLBACK, /* not 0: provenance_by_cookie has been used */
	SETTING_MOVING, /* not 0: look in moves before a socket connects */
	SETTING_REDIRECTS, /* not 0: there are frontends in LAYER_REDIRECTS */
	SETTING_WHOLE, /* TOTAL_LIVE_FULL when the live index was last seen to have all sockets */
	SETTINGS,
};

_Static_assert(SETTINGS <= ROOM, "settings");

/* netns: 0 for everywhere, else the cookie of the one network namespace where it holds. */
struct frontend_key {
	__be32 address[4];
	__u64 netns;
	__u16 port;
	__u8 protocol;
	__u8 layer; /* enum layer */
	__u8 pad[4];
};

enum layer {
	LAYER_SERVICES,
	LAYER_REDIRECTS, /* looked up first; for whom it is not, the other one holds */
};

enum frontend_flag {
	FRONTEND_SCOPED = 1, /* ask again with the netns cookie; what that finds wins */
	FRONTEND_ABSENT = 2, /* where the scoped one is not found: not a service */
	FRONTEND_RESERVED = 4, /* no socket may bind to it */
	FRONTEND_CLIENTS = 8, /* the map clients says for whom it is */
	FRONTEND_LISTED_ONLY = 16, /* ... and it is for nobody else */
};

struct frontend {
	struct frontend_key key;
	__u32 id; /* index of its word and its counters */
	__u32 service;
	__u32 affinity; /* seconds that a client stays with its backend; 0: not at all */
	__u8 type;
	__u8 flags;
	__u8 pad[2];
};

/* A cgroup whose sockets, and those below it, a frontend serves or not: the deepest decides. */
struct client_key {
	__u64 cgroup; /* id: the inode of its directory */
	__u32 frontend;
	__u8 pad[4];
};

enum client {
	CLIENT_SERVED = 1,
	CLIENT_EXCLUDED = 2,
};

enum algorithm {
	ALGORITHM_RANDOM,
	ALGORITHM_ROUND_ROBIN,
	ALGORITHM_MAGLEV,
	ALGORITHM_LEAST_CONNECTIONS,
};

/* The service word, one u64 so that a reader sees a whole one:
 * generation << 32 | algorithm << 28 | count. The count is of slots, or, for round-robin and
 * maglev, of the entries of a table that names slots.
 */
#define WORD_GENERATION(word) ((__u32)((word) >> 32))
#define WORD_ALGORITHM(word) ((__u32)(word) >> 28)
#define WORD_COUNT(word) ((__u32)(word)&0x0fffffff)

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

#define BLOCK_ENTRIES 128

/* A piece of a table: positions of slots. Its key has the number of the piece as `position`. */
struct table_block {
	struct slot_key key;
	__u32 pad;
	__u16 entries[BLOCK_ENTRIES];
};

enum backend_state {
	BACKEND_ACTIVE,
	BACKEND_TERMINATING,
	BACKEND_QUARANTINED,
	BACKEND_MAINTENANCE,
};

/* A backend of one service, by its id. One that left and came back has another id. */
struct backend {
	__u32 id;
	__u32 service;
	__be32 address[4];
	__u16 port;
	__u16 weight;
	__u8 protocol;
	__u8 state;
};

/* A service port, as kube-proxy writes it: namespace/name:port. */
struct service {
	char name[192];
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
	TOTAL_AMBIGUOUS, /* a UDP socket uses one backend for two services: answers go to the latest */
	TOTAL_RESERVED, /* a bind to a reserved frontend was refused */
	TOTAL_REJECTED, /* no backend could serve: EHOSTUNREACH */
	TOTALS,
};

_Static_assert(TOTALS <= ROOM, "totals");

/* How many live sockets a namespace has on a backend; never below the truth. */
struct live_key {
	__u64 netns;
	__u32 service;
	__u32 backend;
};

/* Where a socket is counted. Whoever takes the bits away also subtracts. The rest of the word is the
 * number of the connect, so that nobody takes the bits of another one.
 */
enum counted {
	COUNTED_LIVE = 1, /* in the live index */
	COUNTED_LOAD = 2, /* in the load of the backend, for least-connections */
	COUNTED_BITS = 3,
	COUNTED_CONNECT = 4, /* one connect */
};

enum reason {
	REASON_RANDOM,
	REASON_ROUND_ROBIN,
	REASON_MAGLEV,
	REASON_LEAST_CONNECTIONS,
	REASON_AFFINITY,
	REASON_RESTEER, /* another process has connected the socket */
};

/* What the kernel remembers of a balanced socket. Frozen: programs of different versions share it.
 * A connected UDP socket may go from one backend to another: until it is sure that the kernel let
 * it go there, it is counted at both.
 */
struct provenance {
	__be32 frontend_address[4];
	__be32 backend_address[4];
	__be32 previous_address[4];
	__u64 since; /* CLOCK_BOOTTIME, ns */
	__u64 netns; /* cookie */
	__u32 service;
	__u32 frontend;
	__u32 backend;
	__u32 generation;
	__u32 previous_service;
	__u32 previous_backend;
	__u32 counted;
	__u32 previous_counted;
	__u16 frontend_port;
	__u16 backend_port;
	__u16 previous_port;
	__u8 protocol;
	__u8 reason;
};

/* An unconnected UDP socket keeps its backend of each frontend that it sends to. */
struct datagram_peer {
	__be32 frontend_address[4];
	__be32 backend_address[4];
	__u16 frontend_port;
	__u16 backend_port; /* 0: free */
	__u32 backend;
	__u32 used; /* the clock when it last sent */
};

#define DATAGRAM_PEERS 4

/* Only the hooks of sendmsg and recvmsg write here, one at a time: see datagrams.h. */
struct datagram_peers {
	struct datagram_peer peer[DATAGRAM_PEERS];
	struct bpf_spin_lock lock; /* for older programs of this ABI; nothing needs it */
	__u32 clock;
	__u32 overflown; /* not 0: look in datagram_overflow, too */
};

enum direction {
	TO_BACKEND, /* address: the frontend's */
	TO_FRONTEND, /* address: the backend's */
};

struct overflow_key {
	__u64 cookie;
	__be32 address[4];
	__u16 port;
	__u8 direction;
	__u8 pad[5];
};

struct overflow_peer {
	__be32 address[4];
	__u32 backend;
	__u32 used; /* as in datagram_peer; 0 where the socket has no storage */
	__u16 port;
	__u8 pad[2];
};

/* Who is the client of session affinity: its network namespace. At connect() a socket has no
 * source address yet, and a pod is a namespace.
 */
struct affinity_key {
	__u64 netns;
	__u32 frontend;
	__u8 pad[4];
};

struct affinity {
	__u64 seen; /* CLOCK_BOOTTIME, ns */
	__u32 backend;
	__u8 pad[4];
};

enum policy_setting {
	POLICY_WORD, /* epoch << 32 | flags of the policies in force; 0: there are none */
	POLICY_LATEST, /* the latest epoch, so that none is ever used twice */
	POLICY_NEXT, /* ids of rules, classes and policies are never given twice either */
	POLICY_CHECKSUM, /* of what the word has in force */
	POLICY_LOST, /* counter: denied since rules were not found where they should be */
	POLICY_SETTINGS,
};

_Static_assert(POLICY_SETTINGS <= ROOM, "policy_settings");

enum policy_flag {
	POLICY_NAMES_SPACES = 1, /* some clients are told by their network namespace */
	POLICY_NAMES_CGROUPS = 2,
};

/* Whose sockets; 0 for those of all namespaces, or cgroups, that have no entry of their own. The
 * value is the id of a set of rules, 0: no policy is for them.
 */
struct policy_client {
	__u64 netns;
	__u64 cgroup;
	__u32 epoch;
	__u8 pad[4];
};

/* Keys of LPM tries; prefixlen counts the bits behind it. The value is a class of addresses for
 * which the set of rules says the same.
 */
struct policy_network {
	__u32 prefixlen;
	__u32 rules;
	__be32 address[4];
};

/* Protocol 0, port 0: neither TCP nor UDP. */
struct policy_port {
	__u32 prefixlen;
	__u32 group; /* a class of addresses */
	__u8 protocol;
	__u8 pad;
	__be16 port;
};

struct policy_verdict {
	__u32 policy; /* who denies */
	__u8 denied;
	__u8 pad[3];
};

struct policy {
	char name[192];
	__u64 denied; /* connects and datagrams */
	__u8 allows; /* it denies what neither it nor another one allows */
	__u8 pad[7];
};

/* What a policy has denied a socket last; the key is its cookie. */
struct denial {
	__be32 address[4]; /* after balancing */
	__u64 when; /* CLOCK_BOOTTIME, ns */
	__u64 netns; /* cookie */
	__u32 policy; /* 0: its rules were not found */
	__u32 pid; /* of who called, as the first namespace of process ids numbers it */
	__u16 port;
	__u8 protocol;
	__u8 datagram; /* sent, not connected */
	__u8 pad[4];
};

/* A backend of a service: never another one, since ids are never given twice. */
struct pair {
	__u32 service;
	__u32 backend;
};

/* Another process is about to connect this UDP socket (the key is its cookie) to another backend.
 * It is refused unless the socket is still where that process has seen it: with this peer, and this
 * connect the latest that was balanced.
 */
struct move {
	__be32 peer_address[4];
	__u64 since; /* of its provenance; 0 without one */
	__u32 mover; /* the thread, as the first namespace of process ids numbers it */
	__u32 backend; /* the only one that will do; 0: whichever is chosen */
	__u16 peer_port;
	__u8 pad[6];
};

/* What the program of a socket (the key is its cookie) does while somebody else is about to connect
 * the socket. Written with the socket locked.
 */
struct watch {
	__be32 address[4]; /* where a hook has sent it to, the last time */
	__u32 dials; /* how often it has */
	__u32 through; /* dials + 1 when a hook last let the mover through; 0: not yet */
	__u16 port;
	__u8 pad[6];
};

/* A descriptor of a socket, as owners.bpf.c writes it. Process ids as the reader sees them. */
struct owner_record {
	__u64 cookie;
	__u32 pid;
	__u32 thread; /* it has descriptors of its own where it is not the pid */
	__u32 fd;
	__u32 reader; /* the reading thread's id in the first namespace of process ids */
	__u8 userlocks; /* enum owner_lock */
	__u8 pad[7];
	char command[16];
};

/* SOCK_BINDADDR_LOCK of include/net/sock.h */
enum owner_lock {
	OWNER_BOUND = 4, /* the program has bound the socket to its local address */
};

/* What an iterator writes of a socket. */
struct socket_record {
	struct provenance provenance; /* its service is 0 where there is none */
	__be32 local_address[4];
	__be32 remote_address[4];
	__u64 cookie;
	__u64 inode; /* 0: no process holds it */
	__u64 cgroup; /* id of the one in which it was made */
	__u64 acknowledged; /* TCP: bytes */
	__u64 received;
	__u32 interface; /* that it is bound to, or 0 */
	__u32 unread; /* TCP: bytes that the program has not read */
	__u32 waiting; /* TCP: bytes that the peer has not acknowledged */
	__u32 segments; /* TCP: received, acknowledgements too */
	__u16 local_port;
	__u16 remote_port;
	__u16 family;
	__u8 protocol;
	__u8 state;
	__u32 netns; /* inode */
	__s32 result; /* of ending it: 0 or -errno */
};

/* By which a socket is known apart from its cookie. */
struct socket_ends {
	__be32 local_address[4];
	__be32 remote_address[4];
	__u16 local_port;
	__u16 remote_port;
};

#endif /* SOCKHOP_H */
