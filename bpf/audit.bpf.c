// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Reads any sockmap or sockhash with the sockets that it really holds, and the TCP sockets of a
 * network namespace with their handlers. Linux kernel commit 03653515fc8c ("net: Allow iterating
 * sockmap and sockhash") (in v5.10).
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "audit.h"
#include "audit_socket.h"

/* Keeps the structs in the object's BTF, for Python to check its codecs against. */
const struct audit_end *audit_end_layout __attribute__((unused));

/* One reader at a time has this object. */
static struct {
	struct audit_socket socket;
	__u8 key[KEY_MAX];
} entry;

SEC("iter/sockmap")
int sockhop_entries(struct bpf_iter__sockmap *ctx)
{
	struct sock *sk = ctx->sk;
	void *key = ctx->key;
	__u32 size;

	if (!sk || !key)
		return 0;
	size = ctx->map->key_size;
	if (size > KEY_MAX)
		return 0;
	__builtin_memset(&entry.socket, 0, sizeof(entry.socket));
	fill_socket(&entry.socket, sk);
	/* A direct read would ask for a constant size (sock_map_iter_attach_target). */
	bpf_probe_read_kernel(entry.key, size, key);
	bpf_seq_write(ctx->meta->seq, &entry, sizeof(entry.socket) + size);
	return 0;
}

SEC("iter/tcp")
int sockhop_ends(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	struct audit_end out = {};
	struct tcp_sock *tp;
	struct sock *sk;
	__u64 receiver;

	if (!common)
		return 0;
	/* Nothing for TIME_WAIT and NEW_SYN_RECV: they are no full sockets. */
	tp = bpf_skc_to_tcp_sock(common);
	if (!tp)
		return 0;
	sk = (struct sock *)tp;
	fill_socket(&out.socket, sk);
	/* Linux kernel commit 7b15523a989b ("bpf: Add a bpf_snprintf helper") (in v5.13) */
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_snprintf)) {
		receiver = (__u64)BPF_CORE_READ(sk, __sk_common.skc_prot, recvmsg);
		bpf_snprintf(out.receiver, sizeof(out.receiver), "%ps", &receiver,
			     sizeof(receiver));
	}
	bpf_seq_write(ctx->meta->seq, &out, sizeof(out));
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
