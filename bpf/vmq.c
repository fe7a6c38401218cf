// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * From the NIC to the VM queue. Three programs that ask the same questions:
 *
 * uplink  XDP on the NIC, on the CPU of the RX queue where the frame arrived
 *   1. a group address, or a frame that ends in its own headers  -> bridge
 *   2. nobody's (MAC, VID)                                       -> bridge
 *   3. tags that the port's mode cannot have, any of 802.1ad     -> drop
 *   4. the port is paused, or cannot take a frame of this length -> bridge
 *   5. an AF_XDP port has a socket on this RX queue: 9, but      -> socket
 *   6. the port has it merged with its neighbours first          -> GRO
 *   7. the queue has a CPU of its own, and it is not this one    -> that CPU
 *   8. the device is away                                        -> bridge
 *   9. the tag taken off where the port is not a trunk           -> device
 *
 * queue   XDP in the cpumap, on the queue's CPU: 2, 3, 4, 8 and 9 once more.
 *   It asks again instead of trusting a note from the first program, because a
 *   filter may have moved while the frame waited: no frame is ever delivered on
 *   an answer that is not true any more. The frame comes unchanged, so that it
 *   can still go to the bridge.
 *
 * function   XDP on an SR-IOV virtual function, into which the NIC sorts one port's frames by MAC and
 *   VLAN, and takes the tag off. The questions of uplink, but
 *   1. a group address: the NIC has the frame too                -> drop
 *   2. for another port than the one it serves, or of a VLAN yet -> drop
 *   5. to 7. do not arise: the function's interrupt is on the queue's CPU
 *   "bridge" is XDP_PASS here too: tc gives the frame to the NIC, with its tag (`strayed` in switch.c).
 *
 * "bridge" is XDP_PASS with the frame as it came, and so is "GRO": there it is `wire` in switch.c that hands
 * what GRO has made of it to the device. All of a flow goes one way, so that nothing in it is overtaken.
 * Every frame is counted once per program.
 *
 * The compiler's rewriting of map operations stops at this file's edge: that is
 * why the look-ups are here and only pure functions in the headers.
 */
#include <linux/bpf.h>
#include "abi.h"
#include "classifier.h"
#include "parse.h"

/* Which port a frame is for. Written through a memory mapping by offload/classifier.py. */
BPF_F_TABLE("array", __u32, struct bucket, classifier, BUCKETS, BPF_F_MMAPABLE);
/* The ports of all NICs, by port id. */
BPF_F_TABLE("array", __u32, struct port, ports, MAX_PORTS, BPF_F_MMAPABLE);
/* The ports' devices, by port id. An empty slot: the device is away. */
BPF_XDP_REDIRECT_MAP("devmap", struct bpf_devmap_val, devices, MAX_PORTS);
/* This NIC's queue CPUs, by CPU number, each with the queue program. */
BPF_XDP_REDIRECT_MAP("cpumap", struct bpf_cpumap_val, cpus, MAX_CPUS);
/* The AF_XDP sockets of one port on its NIC, by RX queue: what `sockets` holds. */
BPF_XSKMAP(nic_sockets, MAX_NIC_QUEUES);
/* The ports that have such sockets, by port id. */
BPF_ARRAY_OF_MAPS(sockets, "nic_sockets", MAX_PORTS);
/* What became of each port's frames, by port id. */
BPF_TABLE("percpu_array", __u32, struct port_counters, port_counters, MAX_PORTS);
/* Why this NIC's frames went to the bridge: one row. */
BPF_TABLE("percpu_array", __u32, struct nic_counters, nic_counters, 1);
/* Whom this virtual function serves: one row. */
BPF_TABLE("array", __u32, struct served, served, 1);
/* What became of its other frames: one row. */
BPF_TABLE("percpu_array", __u32, struct function_counters, function_counters, 1);

enum place {
	ON_NIC_CPU,
	ON_QUEUE_CPU,
	ON_FUNCTION,
};

/* A row of struct nic_counters, by name. */
#define ROW(reason) (__builtin_offsetof(struct nic_counters, reason) / sizeof(struct tally))
#define ROWS (sizeof(struct nic_counters) / sizeof(struct tally))

static __always_inline void count(struct tally *tally, __u32 length)
{
	tally->packets++;
	tally->bytes += length;
}

/* The port + 1 of a key, or 0. See classifier.h for why the first bucket is read twice. */
static __always_inline __u32 find_port(__u64 key)
{
	__u64 mixed = mix(key);
	__u32 first = first_bucket(mixed), second = second_bucket(mixed);
	struct bucket *bucket;
	__u32 found;

	bucket = classifier.lookup(&first);
	if (!bucket)
		return 0;
	found = search_bucket(bucket, slot_tag(mixed, 0));
	if (found)
		return found;
	bucket = classifier.lookup(&second);
	if (!bucket)
		return 0;
	found = search_bucket(bucket, slot_tag(mixed, 1));
	if (found)
		return found;
	bucket = classifier.lookup(&first);
	if (!bucket)
		return 0;
	return search_bucket(bucket, slot_tag(mixed, 0));
}

/* Takes the outer tag off: the MACs move up by four bytes. */
static __always_inline int strip_tag(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 *words = data;
	__u32 a, b, c;

	if (data + sizeof(struct ethhdr) + sizeof(struct vlan_tag) > end)
		return -1;
	a = words[0];
	b = words[1];
	c = words[2];
	words[1] = a;
	words[2] = b;
	words[3] = c;
	return bpf_xdp_adjust_head(ctx, sizeof(struct vlan_tag));
}

/* The end of a frame that a virtual function does not deliver. */
static __always_inline int leave(__u32 reason, __u32 length)
{
	struct function_counters *counters;
	struct tally *tally;
	__u32 zero = 0;

	counters = function_counters.lookup(&zero);
	if (!counters)
		return XDP_ABORTED;
	if (reason == ROW(broadcast) || reason == ROW(multicast))
		tally = &counters->group;
	else if (reason == ROW(no_filter) || reason == ROW(malformed))
		tally = &counters->stranger;
	else
		tally = &counters->passed;
	count(tally, length);
	return tally == &counters->passed ? XDP_PASS : XDP_DROP;
}

static __always_inline int steer(struct xdp_md *ctx, enum place place)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct port_counters *counters = 0;
	struct served *own = 0;
	struct nic_counters *missed;
	__u32 length = end - data, reason = ROW(malformed), zero = 0, id;
	struct tally *handed;
	struct frame frame;
	struct port *port;
	void *owned;
	int foreign;

	if (parse_frame(data, end, &frame) < 0)
		goto bridge;
	if (frame.dst & GROUP_BIT) {
		reason = frame.dst == MAC_MASK ? ROW(broadcast) : ROW(multicast);
		goto bridge;
	}

	reason = ROW(no_filter);
	if (place == ON_FUNCTION) {
		own = served.lookup(&zero);
		if (!own || (frame.tags.tagged && (frame.tags.vid || own->vid)))
			goto bridge;
		frame.tags.vid = own->vid;
	}
	id = find_port(filter_key(frame.dst, frame.tags.vid));
	foreign = !id && (frame.tags.service || frame.tags.second);
	if (foreign) /* behind tags that nobody has: a drop of the port whose MAC it is untagged */
		id = find_port(filter_key(frame.dst, 0));
	if (!id)
		goto bridge;
	id--;
	if (own && own->port != id)
		goto bridge;
	port = ports.lookup(&id);
	if (!port)
		goto bridge;
	counters = port_counters.lookup(&id);
	if (!counters)
		goto bridge;

	if (foreign || tags_refused(&frame.tags, port->flags & PORT_TRUNK, port->pvid)) {
		(*(place == ON_QUEUE_CPU ? &counters->vlan_queue : &counters->vlan_nic))++;
		return XDP_DROP;
	}

	reason = port->ifindex ? ROW(paused) : ROW(no_device);
	if (!(port->flags & PORT_RUNNING))
		goto bridge;
	if (port->flags & PORT_FRAGS_POSSIBLE) {
		length = bpf_xdp_get_buff_len(ctx);
		reason = ROW(frags);
		if (port->flags & PORT_NO_FRAGS && length != end - data)
			goto bridge;
	}
	reason = ROW(too_big);
	if (length > port->max_len + (frame.tags.tagged ? sizeof(struct vlan_tag) : 0))
		goto bridge;

	if (place == ON_NIC_CPU && port->flags & PORT_SOCKETS) {
		owned = sockets.lookup((int *)&id);
		handed = &counters->socket;
		if (owned && bpf_redirect_map(owned, ctx->rx_queue_index, XDP_PASS) == XDP_REDIRECT)
			goto hand_over;
	}
	if (place == ON_NIC_CPU && port->flags & (PORT_GRO | PORT_GRO_TCP) &&
	    (port->flags & PORT_GRO || is_tcp(data, end, frame.tags.tagged))) {
		count(&counters->left, length);
		return XDP_PASS;
	}
#ifdef QUEUE_CPUS
	if (place == ON_NIC_CPU && port->cpu != CPU_OF_NIC && port->cpu != bpf_get_smp_processor_id()) {
		reason = ROW(no_cpu);
		if (cpus.redirect_map(port->cpu, XDP_PASS) != XDP_REDIRECT)
			goto bridge;
		count(&counters->queued, length);
		return XDP_REDIRECT;
	}
#endif
	reason = ROW(no_device);
	if (devices.redirect_map(id, XDP_PASS) != XDP_REDIRECT)
		goto bridge;
	handed = place == ON_QUEUE_CPU ? &counters->handed : &counters->direct;
hand_over:
	reason = ROW(malformed);
	if (frame.tags.tagged && (frame.tags.vid == 0 || frame.tags.vid == port->pvid) && strip_tag(ctx) < 0)
		goto bridge;
	count(handed, length);
	return XDP_REDIRECT;

bridge:
	length = bpf_xdp_get_buff_len(ctx);
	if (place == ON_FUNCTION)
		return leave(reason, length);
	if (place == ON_QUEUE_CPU && counters) {
		count(&counters->returned, length);
		return XDP_PASS;
	}
	missed = nic_counters.lookup(&zero);
	if (missed && reason < ROWS)
		count((struct tally *)missed + reason, length);
	return XDP_PASS;
}

int uplink(struct xdp_md *ctx)
{
	return steer(ctx, ON_NIC_CPU);
}

int queue(struct xdp_md *ctx)
{
	return steer(ctx, ON_QUEUE_CPU);
}

int function(struct xdp_md *ctx)
{
	return steer(ctx, ON_FUNCTION);
}
