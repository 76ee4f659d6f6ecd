/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Keys and values of the maps of splicing; like sockhop.h an ABI between C and Python. */
#ifndef SOCKHOP_SPLICE_H
#define SOCKHOP_SPLICE_H

enum splice_setting {
	SPLICE_OFF, /* not 0: no new pairs, and every lane goes to the stack with its next message */
	SPLICE_CGROUPS, /* not 0: splice_owners has cgroups, so look for them */
	SPLICE_SETTINGS,
};

enum splice_mode {
	SPLICE_NEVER, /* a veto, whatever else opts in */
	SPLICE_ON,
	SPLICE_AUTO, /* one pair of CONTROL_SHARE stays on the stack, to compare with */
};

/* What an end is opted in by. `budget`: bytes that may go one way without an answer. `leave_after`:
 * bytes of a stream by the stack after which the pair leaves the sockhash.
 */
struct splice_policy {
	__u32 service; /* 0: not by a service */
	__u32 budget;
	__u32 leave_after;
	__u32 mode;
	__u32 dialled; /* of a place: dialling it opts the client in, too */
};

/* Where a server listens. port 0: all ports. netns: cookie, for loopback addresses; else 0. */
struct splice_place {
	__be32 address[4];
	__u64 netns;
	__u16 port;
	__u8 pad[6];
};

enum splice_owner_kind {
	OWNER_NETNS, /* its cookie */
	OWNER_CGROUP, /* its id; the deepest that is listed decides */
};

struct splice_owner {
	__u64 id;
	__u32 kind;
	__u8 pad[4];
};

/* A connection, the same seen from both ends: `a` is the end with the lesser address and port.
 * The sequence numbers are the first that each end sends: they tell this connection from every
 * other one on the same tuple. netns: cookie, for loopback addresses; else 0.
 */
struct splice_key {
	__be32 a_address[4];
	__be32 b_address[4];
	__u64 netns;
	__u32 a_sequence;
	__u32 b_sequence;
	__u16 a_port;
	__u16 b_port;
	__u8 pad[4];
};

enum splice_lane_mode {
	LANE_UNDECIDED,
	LANE_SPLICED,
	LANE_STACK, /* for good: a receiver reads spliced bytes before those of the stack */
};

/* Why a direction is on the stack, or a socket was left alone. */
enum splice_reason {
	SPLICE_REASON_NONE,
	SPLICE_BUDGET, /* much went one way without an answer */
	SPLICE_BACKLOG, /* the reader does not keep up */
	SPLICE_GONE, /* the peer has left */
	SPLICE_LEFT, /* the pair leaves the sockhash */
	SPLICE_SWITCHED_OFF,
	SPLICE_SHUT, /* send() after shutdown(SHUT_WR) */
	SPLICE_SENT_BEFORE, /* bytes went by the stack before */
	SPLICE_UNPAIRED, /* the first message found no peer */
	SPLICE_ULP, /* kTLS, MPTCP */
	SPLICE_BUSY, /* somebody else's sockmap has the socket */
	SPLICE_KERNEL, /* a socket of the kernel */
	SPLICE_FULL, /* no room, or no memory */
	SPLICE_CONTROL, /* left on the stack to compare with */
	SPLICE_REASONS,
};

/* One end of a pair, in the order of the key. */
struct splice_end {
	__u64 cookie; /* 0: not there yet */
	__u64 sock; /* its struct sock, to be read only, and its cookie with it */
	__u64 unanswered; /* bytes it has sent since the other sent any */
	__u32 mode; /* of the direction that it sends in */
	__u8 pad[4];
};

enum splice_leaves {
	STAYS,
	LEAVES_SOCKHASH, /* both directions go to the stack */
	LEAVES_AS_CONTROL, /* the same, but the sockets stay, for their answers to be timed */
};

/* Its key is the number that the client's end drew for it. */
struct splice_pair {
	struct splice_key key;
	struct splice_end a;
	struct splice_end b;
	__u64 asked; /* CLOCK_MONOTONIC, ns: the client's message that has no answer yet; else 0 */
	__u32 service;
	__u32 budget;
	__u32 leave_after;
	__u32 leaves;
	__u32 mode;
	__u8 pad[4];
};

/* The way out of a socket. In sk_storage: it goes with the socket. */
struct splice_lane {
	struct splice_key key;
	__u64 pair;
	__u64 peer; /* cookie */
	__u64 peer_sock;
	__u64 since; /* CLOCK_BOOTTIME, ns: established */
	__u64 spliced; /* bytes */
	__u64 uncounted; /* of these, bytes that are not in the counters yet */
	__u64 stacked; /* bytes by the stack while in the sockhash */
	__u64 leaving; /* CLOCK_BOOTTIME, ns: nobody will splice to it from then on; 0: not so */
	__u32 queued; /* bytes spliced since the peer's queue was last seen empty */
	__u32 sequence; /* write_seq as long as nothing has gone by the stack */
	__u32 service;
	__u32 budget;
	__u32 leave_after;
	__u8 is_a;
	__u8 is_client;
	__u8 mode;
	__u8 reason;
};

struct splice_counters {
	__u64 pairs;
	__u64 spliced_bytes;
	__u64 stack_bytes; /* of sockets in the sockhash */
	__u64 answers; /* of spliced pairs, and how long they took together, ns */
	__u64 answer_time;
	__u64 control_answers; /* of the pairs kept on the stack for comparison */
	__u64 control_time;
	__u64 removed; /* sockets taken out of the sockhash while they were open */
	__u64 reasons[SPLICE_REASONS];
};

/* What the iterator of sweep.bpf.c writes of each socket in the sockhash. */
struct splice_record {
	struct splice_lane lane;
	__u64 cookie;
	__u64 inode; /* 0: no process holds it */
	__u32 netns_inode;
	__u8 state;
	__u8 has_lane;
	__u8 queue_empty;
	__u8 pad;
};

#endif /* SOCKHOP_SPLICE_H */
