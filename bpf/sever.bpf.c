// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Ends sockets of the namespace in which it is opened: those that are with one of the map pairs, and
 * those that the map named names. The kernel holds the socket's lock meanwhile, so what is looked at
 * is what is ended. Linux kernel commit 4ddbcb886268 ("bpf: Add bpf_sock_destroy kfunc") (in v6.5).
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "sockhop.h"
#include "maps.h"
#include "provenance.h"
#include "socket_record.h"
#include "pairs.h"

/* Weak: one that is missing fails where it is used, not the whole object. */
extern int bpf_sock_destroy(struct sock_common *sock) __ksym __weak;

/* By cookie. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, struct socket_ends);
} named SEC(".maps");

/* Where the socket's own storage was refused, what is remembered lies under its cookie. */
static __always_inline struct provenance *recall(struct sock *sk, __u64 cookie)
{
	struct provenance *p = bpf_sk_storage_get(&provenance, sk, 0, 0);

	return p ? p : bpf_map_lookup_elem(&provenance_by_cookie, &cookie);
}

static __always_inline bool has_ends(const struct socket_record *now,
				     const struct socket_ends *ends)
{
	return ends->local_port == now->local_port && ends->remote_port == now->remote_port &&
	       same_address(ends->local_address, now->local_address) &&
	       same_address(ends->remote_address, now->remote_address);
}

#define STATE(which) (1 << (which))
#define ENDABLE_TCP                                                            \
	(STATE(TCP_ESTABLISHED) | STATE(TCP_SYN_SENT) | STATE(TCP_FIN_WAIT1) | \
	 STATE(TCP_FIN_WAIT2) | STATE(TCP_CLOSE_WAIT) | STATE(TCP_LAST_ACK) | STATE(TCP_CLOSING))

static __always_inline bool may_be_ended(const struct socket_record *now)
{
	if (now->protocol == IPPROTO_UDP)
		return now->inode && now->state == TCP_ESTABLISHED;
	return now->inode && (STATE(now->state) & ENDABLE_TCP);
}

/* What is written too late to fit makes the kernel show the socket again, so it is written before
 * the socket is ended; what then fails is written once more. To end it, the kernel wants the pointer
 * that it gave.
 */
static __always_inline void end(struct seq_file *seq, struct sock *sk, struct sock_common *trusted,
				__u8 protocol)
{
	__u64 cookie = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
	struct socket_ends *ends = bpf_map_lookup_elem(&named, &cookie);
	struct provenance *p = recall(sk, cookie);
	struct socket_record out = {};
	bool meant = false;

	if (p)
		meant = could_be_meant(p);
	if (!meant && !ends)
		return;
	fill_record(&out, sk, protocol);
	if (meant)
		meant = is_meant(p, &out);
	if (!meant && ends)
		meant = has_ends(&out, ends);
	if (!meant || !may_be_ended(&out))
		return;
	if (p)
		out.provenance = *p;
	if (!bpf_sock_destroy || bpf_seq_write(seq, &out, sizeof(out)))
		return;
	out.result = bpf_sock_destroy(trusted);
	if (out.result)
		bpf_seq_write(seq, &out, sizeof(out));
}

SEC("iter/tcp")
int sockhop_end_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	struct tcp_sock *tp;

	if (!common)
		return 0;
	/* Nothing for TIME_WAIT and NEW_SYN_RECV: they are no full sockets. */
	tp = bpf_skc_to_tcp_sock(common);
	if (tp)
		end(ctx->meta->seq, (struct sock *)tp, common, IPPROTO_TCP);
	return 0;
}

SEC("iter/udp")
int sockhop_end_udp(struct bpf_iter__udp *ctx)
{
	struct udp_sock *udp = ctx->udp_sk;

	if (udp)
		end(ctx->meta->seq, (struct sock *)udp, (struct sock_common *)udp, IPPROTO_UDP);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
