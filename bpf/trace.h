/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What trace.bpf.c records; an ABI between C and Python. */
#ifndef SOCKHOP_TRACE_H
#define SOCKHOP_TRACE_H

#define TRACE_FRAMES 24

enum trace_kind {
	TRACE_CALL, /* of the function that `at` lies in */
	TRACE_STATE, /* value: the new state */
	TRACE_RECEIVED, /* value: what recv() returns */
	TRACE_SENT, /* value: what send() returns */
	TRACE_READY, /* whoever waits for data is woken */
	TRACE_END, /* the socket is destroyed */
};

/* What is looked for: one end of connections. */
struct trace_target {
	__be32 address[4]; /* IPv4 mapped */
	__u32 port;
	__u32 pad;
};

struct trace_record {
	__be32 local_address[4]; /* IPv4 mapped */
	__be32 remote_address[4];
	__u64 time; /* ns, CLOCK_MONOTONIC */
	__u64 sock;
	__u64 handlers; /* its sk_prot when the function begins */
	__u64 receiver; /* and sk_prot->recvmsg */
	__u64 at; /* where the program was; 0: at a tracepoint */
	__s64 value;
	__u32 netns; /* inode */
	__u32 pid;
	__u32 thread;
	__u16 local_port;
	__u16 remote_port;
	__u8 kind;
	__u8 state;
	__u8 pad[6];
	char command[16];
	__u64 stack[TRACE_FRAMES]; /* the innermost first, 0 after the last */
};

enum trace_count {
	TRACE_LOST, /* records for which there was no room */
	TRACE_COUNTS,
};

#endif /* SOCKHOP_TRACE_H */
