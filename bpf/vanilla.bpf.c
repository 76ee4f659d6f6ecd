// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* What sockhop does not do: a sockhash by tuple, filled with BPF_NOEXIST. Benchmarks compare with it,
 * and the tests show that they would notice what is wrong with it.
 */
#include "vmlinux.h"
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* Keeps the compiler from merging two branches' loads into one through a pointer that the verifier
 * does not know.
 */
#define KEEP_APART() asm volatile("" ::: "memory")

struct vanilla_key {
	__be32 local[4];
	__be32 remote[4];
	__u32 local_port;
	__u32 remote_port;
};

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 65536);
	__type(key, struct vanilla_key);
	__type(value, __u64);
} vanilla_sockets SEC(".maps");

SEC("sockops")
int vanilla_sock_ops(struct bpf_sock_ops *ctx)
{
	struct vanilla_key key = {};

	if (ctx->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB &&
	    ctx->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	if (ctx->family == AF_INET6) {
		key.local[0] = ctx->local_ip6[0];
		key.local[1] = ctx->local_ip6[1];
		key.local[2] = ctx->local_ip6[2];
		key.local[3] = ctx->local_ip6[3];
		key.remote[0] = ctx->remote_ip6[0];
		key.remote[1] = ctx->remote_ip6[1];
		key.remote[2] = ctx->remote_ip6[2];
		key.remote[3] = ctx->remote_ip6[3];
	} else {
		key.local[3] = ctx->local_ip4;
		key.remote[3] = ctx->remote_ip4;
		KEEP_APART();
	}
	key.local_port = ctx->local_port;
	key.remote_port = bpf_ntohl(ctx->remote_port);
	bpf_sock_hash_update(ctx, &vanilla_sockets, &key, BPF_NOEXIST);
	return 1;
}

SEC("sk_msg")
int vanilla_message(struct sk_msg_md *msg)
{
	struct vanilla_key key = {};

	if (msg->family == AF_INET6) {
		key.local[0] = msg->remote_ip6[0];
		key.local[1] = msg->remote_ip6[1];
		key.local[2] = msg->remote_ip6[2];
		key.local[3] = msg->remote_ip6[3];
		key.remote[0] = msg->local_ip6[0];
		key.remote[1] = msg->local_ip6[1];
		key.remote[2] = msg->local_ip6[2];
		key.remote[3] = msg->local_ip6[3];
	} else {
		key.local[3] = msg->remote_ip4;
		key.remote[3] = msg->local_ip4;
		KEEP_APART();
	}
	key.local_port = bpf_ntohl(msg->remote_port);
	key.remote_port = msg->local_port;
	bpf_msg_redirect_hash(msg, &vanilla_sockets, &key, BPF_F_INGRESS);
	return SK_PASS;
}

char LICENSE[] SEC("license") = "GPL";
