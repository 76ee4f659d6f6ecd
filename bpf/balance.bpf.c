// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Balance: what goes to a frontend goes to one of its backends, decided once, at the socket. */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "sockhop.h"
#include "maps.h"
#include "balance_maps.h"
#include "provenance.h"
#include "choose.h"
#include "clients.h"
#include "datagrams.h"
#include "remember.h"
#include "move.h"
#include "policy.h"

#define EADDRINUSE 98
#define EHOSTUNREACH 113
#define ECANCELED 125
#define ALLOW 1
#define REJECT 0 /* EPERM, if nothing else is said */

/* Linux kernel commit b44123b4a3dc ("bpf: Add cgroup helpers bpf_{get,set}_retval to get/set
 * syscall return value") (in v5.18). Before it: EPERM.
 */
static __always_inline int reject(int error)
{
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_set_retval))
		bpf_set_retval(-error);
	return REJECT;
}

/* --- connect ------------------------------------------------------------------------------- */

/* Where key is a frontend: choose a backend. */
static __always_inline enum verdict balance(struct bpf_sock_addr *ctx, struct frontend_key *key,
					    struct frontend *frontend, struct choice *choice)
{
	const struct move *move = setting(SETTING_MOVING) ? this_move(ctx) : 0;
	int verdict = move ? sockhop_looks(ctx) : PASS;

	if (verdict != PASS)
		return verdict == PUT_BACK ? PUT_BACK : TOO_LATE;
	/* A balanced socket that goes elsewhere is seen by its peer, which is not its backend. */
	if (!find_for(ctx, key, frontend))
		return PASS;
	if (move && move->backend ? !choose_named(frontend, move->backend, choice)
				  : !choose(ctx, frontend, choice))
		return counted(frontend, NO_BACKEND);
	if (move)
		choice->reason = REASON_RESTEER;
	return BALANCED;
}

/* Remembers where the socket goes, and why. */
static __always_inline void let_go(struct bpf_sock_addr *ctx, const struct frontend_key *key,
				   const struct frontend *frontend, const struct choice *choice)
{
	struct provenance fresh = {}, *old;

	copy_address(fresh.frontend_address, key->address);
	copy_address(fresh.backend_address, choice->slot.address);
	fresh.since = bpf_ktime_get_boot_ns();
	fresh.netns = bpf_get_netns_cookie(ctx);
	fresh.service = frontend->service;
	fresh.frontend = frontend->id;
	fresh.backend = choice->slot.backend;
	fresh.generation = choice->generation;
	fresh.frontend_port = key->port;
	fresh.backend_port = choice->slot.port;
	fresh.protocol = key->protocol;
	fresh.reason = choice->reason;
	count_socket(&fresh, choice->load);
	old = recall(ctx, ctx->sk);
	if (old) {
		leave(ctx->sk, old, &fresh);
		*old = fresh;
	} else {
		remember(ctx, &fresh);
	}
	counted(frontend, BALANCED);
}

/* The key of what the hook's caller dials, sends to, or binds to. */
#define KEY4(ctx)                                                                                  \
	{                                                                                          \
		.address = { 0, 0, MAPPED, (ctx)->user_ip4 }, .port = bpf_ntohs((ctx)->user_port), \
		.protocol = (ctx)->protocol,                                                       \
	}
#define KEY6(ctx)                                                                        \
	{                                                                                \
		.address = { (ctx)->user_ip6[0], (ctx)->user_ip6[1], (ctx)->user_ip6[2], \
			     (ctx)->user_ip6[3] },                                       \
		.port = bpf_ntohs((ctx)->user_port), .protocol = (ctx)->protocol,        \
	}

static __always_inline void rewrite4(struct bpf_sock_addr *ctx, const __be32 *address, __u16 port)
{
	ctx->user_ip4 = address[3];
	ctx->user_port = bpf_htons(port);
}

static __always_inline void rewrite6(struct bpf_sock_addr *ctx, const __be32 *address, __u16 port)
{
	ctx->user_ip6[0] = address[0];
	ctx->user_ip6[1] = address[1];
	ctx->user_ip6[2] = address[2];
	ctx->user_ip6[3] = address[3];
	ctx->user_port = bpf_htons(port);
}

/* The last that happens to a connect() while sockets are moved: see move.h. */
__noinline int sockhop_lets_through4(struct bpf_sock_addr *ctx)
{
	struct watch *watch = watch_on(ctx);
	struct frontend_key to = KEY4(ctx);

	if (watch && let_through(ctx, watch, &to))
		rewrite4(ctx, watch->address, watch->port);
	return ALLOW;
}

__noinline int sockhop_lets_through6(struct bpf_sock_addr *ctx)
{
	struct watch *watch = watch_on(ctx);
	struct frontend_key to = KEY6(ctx);

	if (watch && let_through(ctx, watch, &to))
		rewrite6(ctx, watch->address, watch->port);
	return ALLOW;
}

SEC("cgroup/connect4")
int sockhop_connect4(struct bpf_sock_addr *ctx)
{
	struct frontend_key key = KEY4(ctx);
	struct frontend frontend = {};
	struct choice choice = {};

	if (setting(SETTING_BYPASS))
		return ALLOW;
	switch (balance(ctx, &key, &frontend, &choice)) {
	case TOO_LATE:
		return reject(ECANCELED);
	case NO_BACKEND:
		return reject(EHOSTUNREACH);
	case BALANCED:
		rewrite4(ctx, choice.slot.address, choice.slot.port);
		if (is_denied_connect4(ctx))
			return REJECT;
		let_go(ctx, &key, &frontend, &choice);
		break;
	case PASS:
		if (is_denied_connect4(ctx))
			return REJECT;
		break;
	case PUT_BACK:
		break;
	}
	return setting(SETTING_MOVING) ? sockhop_lets_through4(ctx) : ALLOW;
}

SEC("cgroup/connect6")
int sockhop_connect6(struct bpf_sock_addr *ctx)
{
	struct frontend_key key = KEY6(ctx);
	struct frontend frontend = {};
	struct choice choice = {};

	if (setting(SETTING_BYPASS))
		return ALLOW;
	switch (balance(ctx, &key, &frontend, &choice)) {
	case TOO_LATE:
		return reject(ECANCELED);
	case NO_BACKEND:
		return reject(EHOSTUNREACH);
	case BALANCED:
		rewrite6(ctx, choice.slot.address, choice.slot.port);
		if (is_denied_connect6(ctx))
			return REJECT;
		let_go(ctx, &key, &frontend, &choice);
		break;
	case PASS:
		if (is_denied_connect6(ctx))
			return REJECT;
		break;
	case PUT_BACK:
		break;
	}
	return setting(SETTING_MOVING) ? sockhop_lets_through6(ctx) : ALLOW;
}

/* --- sendmsg on an unconnected UDP socket --------------------------------------------------- */

/* A connected socket may still name its peer: it takes answers from there only. */
static __always_inline bool names_its_peer(struct bpf_sock_addr *ctx,
					   const struct frontend_key *key, struct slot *chosen)
{
	const struct provenance *p = recall(ctx, ctx->sk);

	if (!p || p->frontend_port != key->port ||
	    !same_address(p->frontend_address, key->address) ||
	    !is_connected_to(ctx->sk, p->backend_address, p->backend_port))
		return false;
	copy_address(chosen->address, p->backend_address);
	chosen->port = p->backend_port;
	return true;
}

/* From IPv6 to IPv4 a datagram has no way: udpv6_sendmsg() says ENOTSUPP. */
static __always_inline bool may_send(struct bpf_sock_addr *ctx, const struct slot *chosen)
{
	return ctx->user_family != AF_INET6 || !is_mapped(chosen->address);
}

/* Prefers a backend that the socket does not have for another frontend. */
static __always_inline bool avoid_shared(const struct frontend *frontend,
					 struct datagram_peers *peers, __u64 cookie,
					 const struct frontend_key *key, struct slot *chosen)
{
	struct slot other = {};
	struct slot_key last;
	int attempt;

	for (attempt = 0; shares(peers, cookie, key, chosen); attempt++) {
		if (attempt == ATTEMPTS - 1) {
			count(TOTAL_AMBIGUOUS);
			break;
		}
		if (choose_other(frontend, &other))
			*chosen = other;
	}
	/* Read again, all paths become one: the verifier's work is a third. */
	last = chosen->key;
	return read_slot(&last, chosen);
}

/* With a stack of its own: that of a hook has to have room for sockhop_denies_*, too. */
static __noinline enum verdict balance_datagram(struct bpf_sock_addr *ctx,
						const struct frontend_key *key,
						const struct frontend *frontend,
						struct choice *choice)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct datagram_peers *peers;
	struct datagram_peer fresh;
	__u32 before;

	if (names_its_peer(ctx, key, &choice->slot))
		return may_send(ctx, &choice->slot) ? BALANCED : counted(frontend, NO_BACKEND);
	peers = bpf_sk_storage_get(&datagrams, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	fresh = new_peer(key);
	before = backend_before(peers, cookie, key, &fresh.used);
	if (serves(before, frontend->service, BACKEND_ACTIVE, 0, &choice->slot))
		goto stays;
	if (!choose(ctx, frontend, choice) || !may_send(ctx, &choice->slot))
		return counted(frontend, NO_BACKEND);
	/* None is active: those that serve instead keep their sockets, too. */
	if (choice->slot.state != BACKEND_ACTIVE &&
	    serves(before, frontend->service, choice->slot.state, 1, &choice->slot))
		goto stays;
	if (!frontend->affinity && !avoid_shared(frontend, peers, cookie, key, &choice->slot))
		return counted(frontend, NO_BACKEND);
	use_backend(&fresh, &choice->slot);
	if (!peers)
		fall_back();
	keep_peer(peers, cookie, key, &fresh);
	return counted(frontend, BALANCED);

stays:
	use_backend(&fresh, &choice->slot);
	if (may_overflow(peers))
		lead_back(cookie, &fresh);
	return BALANCED;
}

SEC("cgroup/sendmsg4")
int sockhop_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct frontend_key key = KEY4(ctx);
	struct frontend frontend = {};
	struct choice choice = {};

	if (setting(SETTING_BYPASS))
		return ALLOW;
	switch (find_for(ctx, &key, &frontend) ? balance_datagram(ctx, &key, &frontend, &choice)
					       : PASS) {
	case NO_BACKEND:
		return reject(EHOSTUNREACH);
	case BALANCED:
		rewrite4(ctx, choice.slot.address, choice.slot.port);
	default:
		return is_denied_sendmsg4(ctx) ? REJECT : ALLOW;
	}
}

SEC("cgroup/sendmsg6")
int sockhop_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct frontend_key key = KEY6(ctx);
	struct frontend frontend = {};
	struct choice choice = {};

	if (setting(SETTING_BYPASS))
		return ALLOW;
	switch (find_for(ctx, &key, &frontend) ? balance_datagram(ctx, &key, &frontend, &choice)
					       : PASS) {
	case NO_BACKEND:
		return reject(EHOSTUNREACH);
	case BALANCED:
		rewrite6(ctx, choice.slot.address, choice.slot.port);
	default:
		return is_denied_sendmsg6(ctx) ? REJECT : ALLOW;
	}
}

/* --- the way back: getpeername and recvmsg --------------------------------------------------- */

/* The backend of a provenance, or the one before where the socket was moved: late answers. */
static __always_inline bool is_of(const struct provenance *p, const struct frontend_key *peer)
{
	if (p->backend_port == peer->port && same_address(p->backend_address, peer->address))
		return true;
	return p->reason == REASON_RESTEER && p->previous_port == peer->port &&
	       same_address(p->previous_address, peer->address);
}

/* The frontend that a socket dialled, where the address in ctx is its backend's. */
static __always_inline bool dialled(struct bpf_sock_addr *ctx, const struct frontend_key *peer,
				    struct origin *origin)
{
	const struct provenance *p = recall(ctx, ctx->sk);

	if (!p || !is_of(p, peer))
		return false;
	copy_address(origin->address, p->frontend_address);
	origin->port = p->frontend_port;
	return true;
}

static __always_inline bool answered(struct bpf_sock_addr *ctx, const struct frontend_key *source,
				     struct origin *origin)
{
	struct datagram_peers *peers;

	if (dialled(ctx, source, origin))
		return true;
	peers = bpf_sk_storage_get(&datagrams, ctx->sk, 0, 0);
	return (peers || setting(SETTING_FALLBACK)) &&
	       origin_of(peers, bpf_get_socket_cookie(ctx), source, origin);
}

SEC("cgroup/getpeername4")
int sockhop_getpeername4(struct bpf_sock_addr *ctx)
{
	struct frontend_key peer = KEY4(ctx);
	struct origin origin = {};

	if (!setting(SETTING_BYPASS) && dialled(ctx, &peer, &origin) && is_mapped(origin.address))
		rewrite4(ctx, origin.address, origin.port);
	return ALLOW;
}

SEC("cgroup/getpeername6")
int sockhop_getpeername6(struct bpf_sock_addr *ctx)
{
	struct frontend_key peer = KEY6(ctx);
	struct origin origin = {};

	if (!setting(SETTING_BYPASS) && dialled(ctx, &peer, &origin))
		rewrite6(ctx, origin.address, origin.port);
	return ALLOW;
}

SEC("cgroup/recvmsg4")
int sockhop_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct frontend_key source = KEY4(ctx);
	struct origin origin = {};

	if (!setting(SETTING_BYPASS) && answered(ctx, &source, &origin) &&
	    is_mapped(origin.address))
		rewrite4(ctx, origin.address, origin.port);
	return ALLOW;
}

SEC("cgroup/recvmsg6")
int sockhop_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct frontend_key source = KEY6(ctx);
	struct origin origin = {};

	if (!setting(SETTING_BYPASS) && answered(ctx, &source, &origin))
		rewrite6(ctx, origin.address, origin.port);
	return ALLOW;
}

/* --- bind: nobody takes a reserved frontend --------------------------------------------------- */

static __always_inline int may_bind(void *ctx, struct frontend_key *key)
{
	struct frontend frontend = {};

	if (setting(SETTING_BYPASS) || !find_frontend(ctx, key, &frontend) ||
	    !(frontend.flags & FRONTEND_RESERVED))
		return ALLOW;
	count(TOTAL_RESERVED);
	return reject(EADDRINUSE);
}

SEC("cgroup/bind4")
int sockhop_bind4(struct bpf_sock_addr *ctx)
{
	struct frontend_key key = KEY4(ctx);

	return may_bind(ctx, &key);
}

SEC("cgroup/bind6")
int sockhop_bind6(struct bpf_sock_addr *ctx)
{
	struct frontend_key key = KEY6(ctx);

	return may_bind(ctx, &key);
}

/* After bind: what the kernel or another program's bind hook has made of it. */
SEC("cgroup/post_bind4")
int sockhop_post_bind4(struct bpf_sock *sk)
{
	struct frontend_key key = {
		.address = { 0, 0, MAPPED, sk->src_ip4 },
		.port = sk->src_port,
		.protocol = sk->protocol,
	};

	return may_bind(sk, &key);
}

SEC("cgroup/post_bind6")
int sockhop_post_bind6(struct bpf_sock *sk)
{
	struct frontend_key key = {
		.address = { sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3] },
		.port = sk->src_port,
		.protocol = sk->protocol,
	};

	return may_bind(sk, &key);
}

/* --- the end -------------------------------------------------------------------------------- */

/* Runs at close(); in bypass too, since it only counts. */
SEC("cgroup/sock_release")
int sockhop_sock_release(struct bpf_sock *sk)
{
	struct provenance *p = recall(sk, sk);

	if (p) {
		uncount_previous(p);
		uncount(p);
	}
	return ALLOW;
}

char LICENSE[] SEC("license") = "GPL";
