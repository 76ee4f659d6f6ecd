// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Which processes have a descriptor of the sockets that are asked for. Linux kernel commit
 * 4f19cab76136 ("bpf: Add a bpf_sock_from_file helper") (in v5.11).
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "sockhop.h"

/* Keeps the struct in the object's BTF, for Python to check its codec against. */
const struct owner_record *owner_record_layout __attribute__((unused));

/* The cookies of the sockets. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, __u32);
} wanted SEC(".maps");

/* A process id in the namespace of whoever reads. */
static __always_inline __u32 number_of(struct task_struct *task)
{
	struct task_struct *reader = (struct task_struct *)bpf_get_current_task();
	unsigned int level = BPF_CORE_READ(reader, thread_pid, level);
	struct pid *pid = BPF_CORE_READ(task, thread_pid);

	return BPF_CORE_READ(pid, numbers[level].nr);
}

SEC("iter/task_file")
int sockhop_owners(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task, *leader;
	struct owner_record out = {};
	struct file *file = ctx->file;
	struct socket *socket;
	struct sock *sk;

	if (!task || !file)
		return 0;
	socket = bpf_sock_from_file(file);
	if (!socket)
		return 0;
	sk = BPF_CORE_READ(socket, sk);
	if (!sk)
		return 0;
	out.cookie = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
	if (!bpf_map_lookup_elem(&wanted, &out.cookie))
		return 0;
	leader = BPF_CORE_READ(task, group_leader);
	out.pid = number_of(leader);
	out.thread = number_of(task);
	out.fd = ctx->fd;
	out.reader = bpf_get_current_pid_tgid();
	out.userlocks = BPF_CORE_READ_BITFIELD_PROBED(sk, sk_userlocks);
	BPF_CORE_READ_STR_INTO(&out.command, leader, comm);
	bpf_seq_write(ctx->meta->seq, &out, sizeof(out));
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
