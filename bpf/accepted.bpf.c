// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Names the TCP sockets of a network namespace that came out of accept(): a socket that listens
 * gives its children, which are copies of it, its backlog (sk_clone_lock()), and whoever connects
 * has none. Linux kernel commit 52d87d5f6418 ("net: bpf: Implement bpf iterator for tcp")
 * (in v5.9).
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

SEC("iter/tcp")
int sockhop_accepted(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	struct tcp_sock *tp;
	__u64 cookie;

	if (!common)
		return 0;
	/* Nothing for TIME_WAIT and NEW_SYN_RECV: they are no full sockets. */
	tp = bpf_skc_to_tcp_sock(common);
	if (!tp || !BPF_CORE_READ((struct sock *)tp, sk_max_ack_backlog))
		return 0;
	cookie = BPF_CORE_READ((struct sock *)tp, __sk_common.skc_cookie.counter);
	bpf_seq_write(ctx->meta->seq, &cookie, sizeof(cookie));
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
