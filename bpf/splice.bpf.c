// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Splice: what one socket sends to another one on this node goes straight to its queue.
 *
 * Two sockets are a pair if each one's numbers of the handshake are the other's, swapped. Each way
 * decides with its first message, and goes back to the stack, for good, before it could do harm.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "sockhop.h"
#include "splice.h"
#include "maps.h"
#include "provenance.h"
#include "splice_maps.h"
#include "splice_optin.h"

#define SEND_SHUTDOWN 2
#define CONTROL_SHARE 16
#define COUNT_EVERY (1 << 20) /* bytes; else every second by the agent, and at the end */

static __always_inline void note(__u32 service, enum splice_reason reason)
{
	struct splice_counters *counters = counters_of(service);

	if (counters && reason < SPLICE_REASONS)
		add(&counters->reasons[reason], 1);
}

/* --- sock_ops: pairing ---------------------------------------------------------------------- */

static __always_inline bool make_key(struct bpf_sock_ops *ctx, const struct view *at,
				     struct splice_key *key)
{
	__u32 sent = READ_ONCE(ctx->snd_nxt), received = READ_ONCE(ctx->rcv_nxt);
	int order = compare_ends(at);

	if (order < 0) {
		copy_address(key->a_address, at->local);
		copy_address(key->b_address, at->remote);
		key->a_port = at->local_port;
		key->b_port = at->remote_port;
		key->a_sequence = sent;
		key->b_sequence = received;
	} else {
		copy_address(key->a_address, at->remote);
		copy_address(key->b_address, at->local);
		key->a_port = at->remote_port;
		key->b_port = at->local_port;
		key->a_sequence = received;
		key->b_sequence = sent;
	}
	key->netns = at->netns;
	return order < 0;
}

static __always_inline bool same_key(const struct splice_key *a, const struct splice_key *b)
{
	return a->a_sequence == b->a_sequence && a->b_sequence == b->b_sequence &&
	       a->a_port == b->a_port && a->b_port == b->b_port && a->netns == b->netns &&
	       same_address(a->a_address, b->a_address) && same_address(a->b_address, b->b_address);
}

/* A number for a pair: even, and no other one's. */
static __always_inline __u64 draw_number(void)
{
	return ((__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32()) & ~1ULL;
}

static __always_inline void forget_pair(struct splice_lane *lane, __u64 cookie)
{
	struct splice_pair *pair = bpf_map_lookup_elem(&splice_pairs, &lane->pair);

	if (pair && (lane->is_a ? pair->a.cookie : pair->b.cookie) == cookie)
		bpf_map_delete_elem(&splice_pairs, &lane->pair);
}

/* A socket can have been connected before: connect(AF_UNSPEC). Its entry goes, and its queue with
 * it, or bytes for the old connection would arrive on the new one.
 */
static __always_inline void start_afresh(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct splice_lane *old = bpf_sk_storage_get(&splice_lanes, sk, 0, 0);
	__u64 cookie = bpf_get_socket_cookie(ctx);

	if (!old)
		return;
	forget_pair(old, cookie);
	count_spliced(old);
	bpf_map_delete_elem(&splice_sockets, &cookie);
	bpf_sk_storage_delete(&splice_lanes, sk);
}

/* The connection is over, but bytes that are unread stay readable: the entry lives until close().
 * Without such bytes it goes, so that the next call on the socket gets the stack's own answer.
 */
static __always_inline void closed(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct splice_lane *lane = bpf_sk_storage_get(&splice_lanes, sk, 0, 0);
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	struct sk_psock *psock;

	if (!lane || !tp)
		return;
	forget_pair(lane, cookie);
	count_spliced(lane);
	psock = psock_of((struct sock *)tp);
	if (!psock || queue_is_empty(psock))
		bpf_map_delete_elem(&splice_sockets, &cookie);
}

/* Why this socket is none of ours; 0 where it can be spliced. */
static __always_inline enum splice_reason unsuitable(struct tcp_sock *tp)
{
	struct sock *sk = (struct sock *)tp;

	if (BPF_CORE_READ_BITFIELD_PROBED(sk, sk_kern_sock))
		return SPLICE_KERNEL;
	if (tp->inet_conn.icsk_ulp_ops)
		return SPLICE_ULP;
	if (bpf_core_field_exists(tp->is_mptcp) && tp->is_mptcp)
		return SPLICE_ULP;
	if (sk->sk_user_data)
		return SPLICE_BUSY;
	return SPLICE_REASON_NONE;
}

/* Put the socket into the sockhash, with a lane that has not decided yet. */
static __always_inline bool take_in(struct bpf_sock_ops *ctx, struct tcp_sock *tp,
				    struct splice_lane *lane, const struct splice_key *key,
				    const struct splice_policy *policy)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	enum splice_reason reason = unsuitable(tp);

	lane->key = *key;
	lane->since = bpf_ktime_get_boot_ns();
	lane->sequence = ctx->snd_nxt;
	lane->service = policy->service;
	lane->budget = policy->budget;
	lane->leave_after = policy->leave_after;
	if (!reason && bpf_sock_hash_update(ctx, &splice_sockets, &cookie, BPF_NOEXIST))
		reason = SPLICE_FULL;
	if (reason) {
		note(policy->service, reason);
		return false;
	}
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	return true;
}

static __always_inline void connected(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct splice_policy policy = {};
	struct splice_pair pair = {};
	struct handshake handshake;
	struct splice_lane *lane;
	struct tcp_sock *tp;
	struct view at;
	bool is_a;

	look(ctx, &at);
	handshake = find_handshake(&at, false);
	/* The server's end comes first: it is on this node and opted in, or there is no mark. */
	if (!handshake.place || READ_ONCE(*handshake.place) != handshake.mark ||
	    !client_policy(ctx, sk, &at, &policy))
		return;
	tp = bpf_skc_to_tcp_sock(sk);
	lane = bpf_sk_storage_get(&splice_lanes, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!tp || !lane) {
		note(policy.service, SPLICE_FULL);
		return;
	}
	is_a = make_key(ctx, &at, &pair.key);
	lane->pair = draw_number();
	lane->is_a = is_a;
	lane->is_client = 1;
	if (!take_in(ctx, tp, lane, &pair.key, &policy)) {
		bpf_sk_storage_delete(&splice_lanes, sk);
		return;
	}
	pair.service = policy.service;
	pair.budget = policy.budget;
	pair.leave_after = policy.leave_after;
	pair.mode = policy.mode;
	if (is_a) {
		pair.a.cookie = bpf_get_socket_cookie(ctx);
		pair.a.sock = (__u64)tp;
	} else {
		pair.b.cookie = bpf_get_socket_cookie(ctx);
		pair.b.sock = (__u64)tp;
	}
	if (!bpf_map_update_elem(&splice_pairs, &lane->pair, &pair, BPF_NOEXIST))
		*handshake.place = lane->pair;
}

static __always_inline void accepted(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct splice_policy policy = {};
	struct splice_key key = {};
	struct splice_counters *counters;
	struct handshake handshake;
	struct splice_lane *lane;
	struct splice_pair *pair;
	struct splice_end *own;
	struct tcp_sock *tp;
	struct view at;
	__u64 number;
	bool is_a;

	look(ctx, &at);
	if (!server_policy(ctx, sk, &at, &policy))
		return;
	handshake = find_handshake(&at, true);
	if (!handshake.place)
		return;
	number = READ_ONCE(*handshake.place);
	pair = bpf_map_lookup_elem(&splice_pairs, &number);
	is_a = make_key(ctx, &at, &key);
	if (!pair || !same_key(&pair->key, &key) || !(is_a ? pair->b.cookie : pair->a.cookie))
		return;
	own = is_a ? &pair->a : &pair->b;
	/* A socket that is connected to itself is both ends. */
	if (own->cookie)
		return;
	policy.service = pair->service;
	policy.budget = pair->budget;
	policy.leave_after = pair->leave_after;
	tp = bpf_skc_to_tcp_sock(sk);
	lane = bpf_sk_storage_get(&splice_lanes, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!tp || !lane) {
		note(policy.service, SPLICE_FULL);
		return;
	}
	lane->pair = number;
	lane->is_a = is_a;
	if (!take_in(ctx, tp, lane, &key, &policy)) {
		bpf_sk_storage_delete(&splice_lanes, sk);
		return;
	}
	own->sock = (__u64)tp;
	own->cookie = bpf_get_socket_cookie(ctx);
	counters = counters_of(policy.service);
	if (counters)
		add(&counters->pairs, 1);
}

SEC("sockops")
int sockhop_sock_ops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	switch (ctx->op) {
	case BPF_SOCK_OPS_RWND_INIT:
		if (!ctx->is_fullsock && !switched_off())
			expect(ctx);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		if (!sk)
			break;
		start_afresh(ctx, sk);
		if (switched_off())
			break;
		if (ctx->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
			connected(ctx, sk);
		else
			accepted(ctx, sk);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (sk && ctx->args[1] == TCP_CLOSE)
			closed(ctx, sk);
	}
	return 1;
}

/* --- sk_msg: what a socket sends ------------------------------------------------------------ */

static __always_inline void leave(struct splice_lane *lane, struct splice_end *own,
				  enum splice_reason reason)
{
	lane->mode = LANE_STACK;
	lane->reason = reason;
	if (own)
		own->mode = LANE_STACK;
	note(lane->service, reason);
}

/* The first message: find the peer. It may be missing, or its entry may be another's by now. */
static __always_inline enum splice_reason decide(struct splice_lane *lane, struct splice_pair *pair)
{
	struct splice_end *peer;
	__u64 cookie, sock;

	if (!pair)
		return SPLICE_UNPAIRED;
	peer = lane->is_a ? &pair->b : &pair->a;
	cookie = READ_ONCE(peer->cookie);
	sock = READ_ONCE(peer->sock);
	/* Elements of a hash are reused while they are read: compare the key after the value. */
	if (!cookie || !same_key(&pair->key, &lane->key))
		return SPLICE_UNPAIRED;
	if (pair->mode == SPLICE_AUTO && lane->is_client &&
	    bpf_get_prandom_u32() % CONTROL_SHARE == 0)
		return SPLICE_CONTROL;
	lane->peer = cookie;
	lane->peer_sock = sock;
	lane->mode = LANE_SPLICED;
	return SPLICE_REASON_NONE;
}

/* What is to be known of a peer. Its memory may be another socket's by now: the cookie tells. */
struct peer {
	__u64 cookie;
	__u32 room;
	__u8 state;
	bool has_ulp;
	bool has_queue;
	bool queue_is_empty;
};

/* Linux kernel commit a35b9af4ec2c ("bpf: Add a kfunc for generic type cast") (in v6.2): plain loads.
 * Without it each field costs a call.
 */
extern void *bpf_rdonly_cast(const void *obj, __u32 btf_id) __ksym __weak;

static __always_inline void load_peer(__u64 address, struct peer *out)
{
	struct tcp_sock *tp =
		bpf_rdonly_cast((void *)address, bpf_core_type_id_kernel(struct tcp_sock));
	struct sock *sk = &tp->inet_conn.icsk_inet.sk;
	__u64 data = (__u64)sk->sk_user_data & ~7ULL;
	struct sk_psock *psock =
		bpf_rdonly_cast((void *)data, bpf_core_type_id_kernel(struct sk_psock));

	out->room = sk->sk_rcvbuf;
	out->state = sk->__sk_common.skc_state;
	out->has_ulp = !!tp->inet_conn.icsk_ulp_ops;
	out->has_queue = !!data;
	out->queue_is_empty =
		(__u64)psock->ingress_msg.next == data + bpf_core_field_offset(psock->ingress_msg);
	out->cookie = sk->__sk_common.skc_cookie.counter;
}

static __always_inline void read_peer(__u64 address, struct peer *out)
{
	struct tcp_sock *tp = (struct tcp_sock *)address;
	struct sock *sk = (struct sock *)tp;
	struct sk_psock *psock = psock_of(sk);

	out->room = BPF_CORE_READ(sk, sk_rcvbuf);
	out->state = BPF_CORE_READ(sk, __sk_common.skc_state);
	out->has_ulp = !!BPF_CORE_READ(tp, inet_conn.icsk_ulp_ops);
	out->has_queue = !!psock;
	out->queue_is_empty = queue_is_empty(psock);
	out->cookie = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
}

/* Whether the peer can take `size` bytes more. */
static __always_inline enum splice_reason ask_peer(struct splice_lane *lane, __u32 size)
{
	struct peer peer = {};
	__u32 limit;

	if (bpf_rdonly_cast)
		load_peer(lane->peer_sock, &peer);
	else
		read_peer(lane->peer_sock, &peer);
	if (peer.has_ulp)
		return SPLICE_ULP;
	/* Another state cannot receive: bytes would rot in the queue where the stack says RST. */
	if (peer.state != TCP_ESTABLISHED && peer.state != TCP_FIN_WAIT1 &&
	    peer.state != TCP_FIN_WAIT2)
		return SPLICE_GONE;
	if (!peer.has_queue || peer.cookie != lane->peer)
		return SPLICE_GONE;
	if (peer.queue_is_empty)
		lane->queued = 0;
	limit = peer.room / 2;
	if (limit > lane->budget)
		limit = lane->budget;
	return lane->queued + size > limit ? SPLICE_BACKLOG : SPLICE_REASON_NONE;
}

/* Why this message must not be spliced; 0 if it may. */
static __always_inline enum splice_reason
must_leave(struct splice_lane *lane, struct splice_pair *pair, struct tcp_sock *tp, __u32 size)
{
	struct sock *sk = (struct sock *)tp;
	enum splice_reason reason;

	if (switched_off())
		return SPLICE_SWITCHED_OFF;
	if (sk->sk_shutdown & SEND_SHUTDOWN)
		return SPLICE_SHUT;
	if (tp->write_seq != lane->sequence)
		return SPLICE_SENT_BEFORE;
	if (tp->inet_conn.icsk_ulp_ops)
		return SPLICE_ULP;
	if (lane->mode == LANE_UNDECIDED) {
		reason = decide(lane, pair);
		if (reason)
			return reason;
	}
	if (!pair)
		return SPLICE_GONE;
	if (pair->leaves)
		return SPLICE_LEFT;
	if ((lane->is_a ? pair->a.unanswered : pair->b.unanswered) + size > lane->budget)
		return SPLICE_BUDGET;
	return ask_peer(lane, size);
}

/* How long the server takes to answer, by the stack or spliced: what `auto` compares. */
static __always_inline void time_answer(struct splice_lane *lane, struct splice_pair *pair,
					bool is_control)
{
	struct splice_counters *counters;
	__u64 asked = pair->asked, now;

	if (pair->mode != SPLICE_AUTO || !lane->is_client == !asked)
		return;
	now = bpf_ktime_get_ns();
	pair->asked = lane->is_client ? now : 0;
	counters = lane->is_client ? 0 : counters_of(lane->service);
	if (!counters)
		return;
	add(is_control ? &counters->control_answers : &counters->answers, 1);
	add(is_control ? &counters->control_time : &counters->answer_time, now - asked);
}

static __always_inline int by_stack(struct splice_lane *lane, struct splice_pair *pair, __u32 size)
{
	struct splice_counters *counters = counters_of(lane->service);

	lane->stacked += size;
	if (counters)
		add(&counters->stack_bytes, size);
	if (!pair)
		return SK_PASS;
	/* An answer, too. */
	(lane->is_a ? &pair->b : &pair->a)->unanswered = 0;
	/* A stream gains nothing from the other way; without it the pair can leave the sockhash. */
	if (lane->stacked > lane->leave_after &&
	    (lane->reason == SPLICE_BUDGET || lane->reason == SPLICE_BACKLOG))
		pair->leaves = LEAVES_SOCKHASH;
	if (pair->leaves == LEAVES_AS_CONTROL)
		time_answer(lane, pair, true);
	return SK_PASS;
}

SEC("sk_msg")
int sockhop_message(struct sk_msg_md *msg)
{
	struct bpf_sock *sk = msg->sk;
	struct splice_end *own, *peer;
	struct splice_lane *lane;
	struct splice_pair *pair;
	enum splice_reason reason;
	__u32 size = msg->size;
	struct tcp_sock *tp;
	__u64 cookie;

	if (!sk)
		return SK_PASS;
	lane = bpf_sk_storage_get(&splice_lanes, sk, 0, 0);
	tp = bpf_skc_to_tcp_sock(sk);
	if (!lane || !tp)
		return SK_PASS;
	pair = bpf_map_lookup_elem(&splice_pairs, &lane->pair);
	if (lane->mode == LANE_STACK)
		return by_stack(lane, pair, size);
	reason = must_leave(lane, pair, tp, size);
	cookie = lane->peer;
	if (!reason &&
	    bpf_msg_redirect_hash(msg, &splice_sockets, &cookie, BPF_F_INGRESS) != SK_PASS)
		reason = SPLICE_GONE;
	if (reason || !pair) {
		leave(lane, pair ? (lane->is_a ? &pair->a : &pair->b) : 0, reason);
		if (pair && reason == SPLICE_CONTROL)
			pair->leaves = LEAVES_AS_CONTROL;
		return by_stack(lane, pair, size);
	}
	own = lane->is_a ? &pair->a : &pair->b;
	peer = lane->is_a ? &pair->b : &pair->a;
	own->mode = LANE_SPLICED;
	own->unanswered += size;
	peer->unanswered = 0;
	lane->queued += size;
	lane->spliced += size;
	add(&lane->uncounted, size);
	if (lane->uncounted > COUNT_EVERY)
		count_spliced(lane);
	time_answer(lane, pair, false);
	return SK_PASS;
}

char LICENSE[] SEC("license") = "GPL";
