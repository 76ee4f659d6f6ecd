/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* When another process connects a UDP socket: is the socket still what that process has seen?
 *
 * The hook runs with the socket locked (udp_pre_connect()), so between this look and the choice
 * that follows the program itself cannot go elsewhere.
 */
#ifndef SOCKHOP_MOVE_H
#define SOCKHOP_MOVE_H

/* The move that this connect() is, if it is one. */
static __always_inline struct move *this_move(struct bpf_sock_addr *ctx)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct move *move = bpf_map_lookup_elem(&moves, &cookie);

	/* The program's own connect() is none. */
	return move && move->mover == bpf_get_current_pid_tgid() >> 32 ? move : 0;
}

static __always_inline bool is_still_there(struct bpf_sock_addr *ctx, const struct move *move)
{
	const struct provenance *p = recall(ctx, ctx->sk);

	return move->since == (p ? p->since : 0) &&
	       is_connected_to(ctx->sk, move->peer_address, move->peer_port);
}

#endif /* SOCKHOP_MOVE_H */
