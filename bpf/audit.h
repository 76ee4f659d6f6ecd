/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What the iterators of audit.bpf.c and heal.bpf.c write; an ABI between C and Python. */
#ifndef SOCKHOP_AUDIT_H
#define SOCKHOP_AUDIT_H

#define KEY_MAX 512 /* of a sockhash: MAX_BPF_STACK (net/core/sock_map.c) */

enum audit_flag {
	AUDIT_PSOCK = 1, /* a sockmap or sockhash has it */
	AUDIT_HANDLERS = 2, /* and its handlers (sk_prot) are those of the psock */
	AUDIT_PARSER = 4, /* a program sees what it sends (sk_msg) */
	AUDIT_MORE = 8, /* `spliced` is not all that is queued */
	AUDIT_IPV6ONLY = 16, /* IPV6_V6ONLY: not for IPv4 */
};

/* What is zero for sockets that are not TCP begins with `acknowledged`. */
struct audit_socket {
	__be32 local_address[4]; /* IPv4 mapped */
	__be32 remote_address[4];
	__u64 sock; /* its struct sock, to tell it from others */
	__u64 cookie; /* 0: nobody has asked for it yet */
	__u64 inode; /* 0: no process holds it */
	__u32 netns; /* inode */
	__u32 interface;
	__u32 spliced; /* bytes in the psock's queue */
	__u16 local_port;
	__u16 remote_port;
	__u16 family;
	__u16 protocol;
	__u8 state;
	__u8 flags;
	__u8 pad[2];
	__u64 acknowledged;
	__u64 received;
	__u32 unread;
	__u32 waiting;
	__u32 rcv_nxt;
	__u32 snd_una;
	__u32 copied_seq;
	__u32 segs_in;
	__u32 segs_out;
	char ulp[16];
	__u32 first_size; /* what is left of the first message in the psock's queue */
	__u64 first; /* and which that is */
};

/* A TCP socket, and the function that a recv() of it calls. */
struct audit_end {
	struct audit_socket socket;
	char receiver[32]; /* "" before Linux 5.13 */
};

/* An entry of a sockhash: what its socket was like when it was called stale. By its key. */
struct doom {
	__be32 local_address[4];
	__be32 remote_address[4];
	__u64 sock;
	__u64 cookie;
	__u16 local_port;
	__u16 remote_port;
	__u8 state;
	__u8 lose; /* also if bytes are unread */
	__u8 pad[2];
};

enum heal_result {
	HEAL_DELETED,
	HEAL_CHANGED, /* it holds another socket by now, or the same with other ends */
	HEAL_UNREAD, /* its socket has unread spliced bytes */
	HEAL_REFUSED, /* by the kernel: error */
};

/* Followed by the key. Of two for one key the last counts. */
struct heal_record {
	__u32 unread;
	__u32 error;
	__u8 result;
	__u8 more; /* `unread` is not all */
	__u8 pad[2];
};

#endif /* SOCKHOP_AUDIT_H */
