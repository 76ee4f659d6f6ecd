// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Records which kernel functions run for the TCP sockets of one address and port, with stacks and
 * handlers (sk_prot). One kprobe program for each place at which functions have their socket; raw
 * tracepoints for kernels without kprobes. Nothing is attached by itself.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "trace.h"

#define MAPPED bpf_htonl(0xffff)
#define TCP_LISTEN 10

/* Keeps the structs in the object's BTF, for Python to check its codecs against. */
const struct trace_record *trace_record_layout __attribute__((unused));
const struct trace_target *trace_target_layout __attribute__((unused));

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct trace_target);
} trace_target SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, TRACE_COUNTS);
	__type(key, __u32);
	__type(value, __u64);
} trace_counts SEC(".maps");

/* Bounded: what finds no room is counted and lost. */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, 8192);
	__uint(value_size, sizeof(struct trace_record));
} trace_records SEC(".maps");

/* Threads in a recv() or send() that is recorded, with the socket. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u64);
} trace_threads SEC(".maps");

static __always_inline bool is_target(const __be32 *address, __u16 port,
				      const struct trace_target *target)
{
	return port == target->port && address[0] == target->address[0] &&
	       address[1] == target->address[1] && address[2] == target->address[2] &&
	       address[3] == target->address[3];
}

/* Nearly all sockets are others': they cost two reads. */
static __always_inline const struct trace_target *target_of(struct sock *sk)
{
	const struct trace_target *target;
	__u32 zero = 0;

	target = bpf_map_lookup_elem(&trace_target, &zero);
	if (!target || !sk)
		return NULL;
	if (BPF_CORE_READ(sk, __sk_common.skc_num) == target->port ||
	    bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport)) == target->port)
		return target;
	return NULL;
}

/* Fills in whose record it is; false if it is nobody's that is looked for. */
static __always_inline bool begin(struct trace_record *out, struct sock *sk,
				  const struct trace_target *target)
{
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);

	out->local_port = BPF_CORE_READ(sk, __sk_common.skc_num);
	out->remote_port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	out->state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (out->state == TCP_LISTEN)
		return false;
	if (family == AF_INET6) {
		BPF_CORE_READ_INTO(&out->local_address, sk,
				   __sk_common.skc_v6_rcv_saddr.in6_u.u6_addr32);
		BPF_CORE_READ_INTO(&out->remote_address, sk,
				   __sk_common.skc_v6_daddr.in6_u.u6_addr32);
	} else if (family == AF_INET) {
		out->local_address[2] = out->remote_address[2] = MAPPED;
		out->local_address[3] = BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr);
		out->remote_address[3] = BPF_CORE_READ(sk, __sk_common.skc_daddr);
	} else {
		return false;
	}
	return is_target(out->local_address, out->local_port, target) ||
	       is_target(out->remote_address, out->remote_port, target);
}

static __always_inline void finish(void *ctx, struct trace_record *out, struct sock *sk)
{
	__u64 task = bpf_get_current_pid_tgid(), *lost;
	__u32 which = TRACE_LOST;

	out->time = bpf_ktime_get_ns();
	out->sock = (__u64)sk;
	out->handlers = (__u64)BPF_CORE_READ(sk, __sk_common.skc_prot);
	out->receiver = (__u64)BPF_CORE_READ(sk, __sk_common.skc_prot, recvmsg);
	out->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	out->pid = task >> 32;
	out->thread = task;
	bpf_get_current_comm(out->command, sizeof(out->command));
	bpf_get_stack(ctx, out->stack, sizeof(out->stack), 0);
	if (bpf_map_push_elem(&trace_records, out, BPF_ANY)) {
		lost = bpf_map_lookup_elem(&trace_counts, &which);
		if (lost)
			__atomic_fetch_add(lost, 1, __ATOMIC_RELAXED);
	}
}

/* Not inlined: a record takes most of a stack, and is only made for sockets that are looked for. */
static __noinline int record(void *ctx, struct sock *sk, __u64 kind, __u64 at, __s64 value)
{
	const struct trace_target *target = target_of(sk);
	struct trace_record out = {};

	if (!target || !begin(&out, sk, target))
		return 0;
	out.kind = kind;
	out.at = at;
	out.value = value;
	finish(ctx, &out, sk);
	return 1;
}

static __always_inline int record_call(struct pt_regs *ctx, struct sock *sk)
{
	return target_of(sk) ? record(ctx, sk, TRACE_CALL, PT_REGS_IP(ctx), 0) : 0;
}

SEC("kprobe")
int sockhop_sock_1(struct pt_regs *ctx)
{
	return record_call(ctx, (struct sock *)PT_REGS_PARM1(ctx));
}

SEC("kprobe")
int sockhop_sock_2(struct pt_regs *ctx)
{
	return record_call(ctx, (struct sock *)PT_REGS_PARM2(ctx));
}

SEC("kprobe")
int sockhop_sock_3(struct pt_regs *ctx)
{
	return record_call(ctx, (struct sock *)PT_REGS_PARM3(ctx));
}

SEC("kprobe")
int sockhop_socket_1(struct pt_regs *ctx)
{
	struct socket *socket = (struct socket *)PT_REGS_PARM1(ctx);

	return record_call(ctx, BPF_CORE_READ(socket, sk));
}

/* The functions whose returns are recorded, too. */
SEC("kprobe")
int sockhop_transfer(struct pt_regs *ctx)
{
	struct socket *socket = (struct socket *)PT_REGS_PARM1(ctx);
	__u64 sk = (__u64)BPF_CORE_READ(socket, sk), task;

	if (record_call(ctx, (struct sock *)sk)) {
		task = bpf_get_current_pid_tgid();
		bpf_map_update_elem(&trace_threads, &task, &sk, BPF_ANY);
	}
	return 0;
}

static __always_inline int record_return(struct pt_regs *ctx, __u8 kind)
{
	__u64 task = bpf_get_current_pid_tgid(), *found;
	struct sock *sk;

	found = bpf_map_lookup_elem(&trace_threads, &task);
	if (!found)
		return 0;
	sk = (struct sock *)*found;
	bpf_map_delete_elem(&trace_threads, &task);
	return record(ctx, sk, kind, PT_REGS_IP(ctx), (int)PT_REGS_RC(ctx));
}

SEC("kretprobe")
int sockhop_received(struct pt_regs *ctx)
{
	return record_return(ctx, TRACE_RECEIVED);
}

SEC("kretprobe")
int sockhop_sent(struct pt_regs *ctx)
{
	return record_return(ctx, TRACE_SENT);
}

/* Tracepoints: each has its socket first. */
static __always_inline int record_point(struct bpf_raw_tracepoint_args *ctx, __u8 kind, __s64 value)
{
	struct sock *sk = (struct sock *)ctx->args[0];

	return target_of(sk) ? record(ctx, sk, kind, 0, value) : 0;
}

/* Linux kernel commit 563e0bb0dc74 ("net: tracepoint: replace tcp_set_state tracepoint with
 * inet_sock_set_state tracepoint") (in v4.16)
 */
SEC("raw_tp/inet_sock_set_state")
int sockhop_state(struct bpf_raw_tracepoint_args *ctx)
{
	return record_point(ctx, TRACE_STATE, (int)ctx->args[2]);
}

SEC("raw_tp/tcp_destroy_sock")
int sockhop_end(struct bpf_raw_tracepoint_args *ctx)
{
	return record_point(ctx, TRACE_END, 0);
}

/* Linux kernel commit 6e6eda44b939 ("sock: add tracepoint for send recv length") (in v6.3) */
SEC("raw_tp/sock_recv_length")
int sockhop_recv_length(struct bpf_raw_tracepoint_args *ctx)
{
	return record_point(ctx, TRACE_RECEIVED, (int)ctx->args[1]);
}

SEC("raw_tp/sock_send_length")
int sockhop_send_length(struct bpf_raw_tracepoint_args *ctx)
{
	return record_point(ctx, TRACE_SENT, (int)ctx->args[1]);
}

/* Linux kernel commit 40e0b0908142 ("net/sock: Introduce trace_sk_data_ready()") (in v6.3) */
SEC("raw_tp/sk_data_ready")
int sockhop_ready(struct bpf_raw_tracepoint_args *ctx)
{
	return record_point(ctx, TRACE_READY, 0);
}

char LICENSE[] SEC("license") = "GPL";
