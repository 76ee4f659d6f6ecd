/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* When another process connects a UDP socket: is the socket still what that process has seen, and
 * does it stay so until it is connected?
 *
 * A connect() locks the socket twice, once for the hooks (udp_pre_connect()) and once to connect it
 * (udp_connect()). Within the first nobody else can connect the socket: if it is not what the mover
 * has seen, the mover is refused. Between the two, anybody can. So what the program dials is noted
 * from before the first on, and the mover looks into that after the second. If there is something,
 * the mover connects again, as often as it takes, and the hook sends it where the program went.
 */
#ifndef SOCKHOP_MOVE_H
#define SOCKHOP_MOVE_H

/* The move that this connect() is, if it is one. */
static __always_inline struct move *this_move(struct bpf_sock_addr *ctx)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct move *move = bpf_map_lookup_elem(&moves, &cookie);

	/* The program's own connect() is none, even if the program is the mover's process. */
	return move && move->mover == (__u32)bpf_get_current_pid_tgid() ? move : 0;
}

static __always_inline struct watch *watch_on(struct bpf_sock_addr *ctx)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);

	return bpf_map_lookup_elem(&watched, &cookie);
}

static __always_inline bool has_peer(struct bpf_sock *sk, const struct move *move)
{
	return is_connected_to(sk, move->peer_address, move->peer_port);
}

static __always_inline bool is_still_there(struct bpf_sock_addr *ctx, const struct move *move)
{
	const struct provenance *p = recall(ctx, ctx->sk);

	return move->since == (p ? p->since : 0) && has_peer(ctx->sk, move);
}

/* PASS: it may go on. A function of its own, with its own stack. */
__noinline int sockhop_looks(struct bpf_sock_addr *ctx)
{
	const struct watch *watch = watch_on(ctx);
	const struct move *move = this_move(ctx);

	if (!watch || !move)
		return TOO_LATE;
	if (watch->through)
		return has_peer(ctx->sk, move) ? PUT_BACK : TOO_LATE;
	return watch->dials || !is_still_there(ctx, move) ? TOO_LATE : PASS;
}

/* Somebody is let through to an address. Returns whether he is the mover who puts the socket back:
 * he goes to where the program went last.
 */
static __always_inline bool let_through(struct bpf_sock_addr *ctx, struct watch *watch,
					const struct frontend_key *to)
{
	bool back = watch->through;

	if (!this_move(ctx)) {
		copy_address(watch->address, to->address);
		watch->port = to->port;
		watch->dials++;
		return false;
	}
	watch->through = watch->dials + 1;
	return back;
}

#endif /* SOCKHOP_MOVE_H */
