/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* For whom a frontend is: by the cgroup in which the socket was made, never the current task's. */
#ifndef SOCKHOP_CLIENTS_H
#define SOCKHOP_CLIENTS_H

#define DEEPEST 32

/* Linux kernel commit a35b9af4ec2c ("bpf: Add a kfunc for generic type cast") (in v6.2). */
extern void *bpf_rdonly_cast(const void *obj, __u32 btf_id) __ksym __weak;

static __always_inline __u32 listed(__u32 frontend, __u64 cgroup)
{
	struct client_key key = { .cgroup = cgroup, .frontend = frontend };
	__u32 *found = bpf_map_lookup_elem(&clients, &key);

	return found ? READ_ONCE(*found) : 0;
}

/* A function of its own, which the verifier looks at once. */
__noinline int sockhop_serves(struct bpf_sock_addr *ctx, __u32 frontend, __u32 flags)
{
	struct cgroup *cgroup, *ancestor;
	__u32 said = 0;
	int level, depth;

	/* Without the cast nothing is known of the socket's cgroup: serve nobody who must be listed. */
	if (!bpf_rdonly_cast)
		return !(flags & FRONTEND_LISTED_ONLY);
	cgroup = BPF_CORE_READ(
		(struct sock *)bpf_rdonly_cast(ctx->sk, bpf_core_type_id_kernel(struct sock)),
		sk_cgrp_data.cgroup);
	level = BPF_CORE_READ(cgroup, level);
	for (depth = 0; depth < DEEPEST && !said && level - depth >= 0; depth++) {
		ancestor = BPF_CORE_READ(cgroup, ancestors[level - depth]);
		said = listed(frontend, BPF_CORE_READ(ancestor, kn, id));
	}
	return said ? said == CLIENT_SERVED : !(flags & FRONTEND_LISTED_ONLY);
}

static __always_inline bool is_for(struct bpf_sock_addr *ctx, const struct frontend *frontend)
{
	return !(frontend->flags & FRONTEND_CLIENTS) ||
	       sockhop_serves(ctx, frontend->id, frontend->flags);
}

/* What key is for this socket: a redirect, or else a service. */
static __always_inline bool find_for(struct bpf_sock_addr *ctx, struct frontend_key *key,
				     struct frontend *found)
{
	if (setting(SETTING_REDIRECTS)) {
		key->layer = LAYER_REDIRECTS;
		if (find_frontend(ctx, key, found) && is_for(ctx, found))
			return true;
		key->layer = LAYER_SERVICES;
		key->netns = 0;
	}
	return find_frontend(ctx, key, found) && is_for(ctx, found);
}

#endif /* SOCKHOP_CLIENTS_H */
