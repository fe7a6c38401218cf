// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * From the NIC to the VM queue. Two programs that ask the same questions:
 *
 * uplink  XDP on the NIC, on the CPU of the RX queue where the frame arrived
 *   1. a group address, or a frame that ends in its own headers  -> bridge
 *   2. nobody's (MAC, VID)                                       -> bridge
 *   3. tags that the port's mode cannot have, any of 802.1ad     -> drop
 *   4. the port is paused, or cannot take a frame of this length -> bridge
 *   5. an AF_XDP port has a socket on this RX queue: 8, but      -> socket
 *   6. the queue has a CPU of its own, and it is not this one    -> that CPU
 *   7. the device is away                                        -> bridge
 *   8. the tag taken off where the port is not a trunk           -> device
 *
 * queue   XDP in the cpumap, on the queue's CPU: 2, 3, 4, 7 and 8 once more.
 *   It asks again instead of trusting a note from the first program, because a
 *   filter may have moved while the frame waited: no frame is ever delivered on
 *   an answer that is not true any more. The frame comes unchanged, so that it
 *   can still go to the bridge.
 *
 * "bridge" is XDP_PASS with the frame as it came. Every frame is counted once
 * per program, in finish().
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

enum place {
	ON_NIC_CPU,
	ON_QUEUE_CPU,
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

static __always_inline int steer(struct xdp_md *ctx, enum place place)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct port_counters *counters = 0;
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
	id = find_port(filter_key(frame.dst, frame.tags.vid));
	foreign = !id && (frame.tags.service || frame.tags.second);
	if (foreign) /* behind tags that nobody has: a drop of the port whose MAC it is untagged */
		id = find_port(filter_key(frame.dst, 0));
	if (!id)
		goto bridge;
	id--;
	port = ports.lookup(&id);
	if (!port)
		goto bridge;
	counters = port_counters.lookup(&id);
	if (!counters)
		goto bridge;

	if (foreign || tags_refused(&frame.tags, port->flags & PORT_TRUNK, port->pvid)) {
		(*(place == ON_NIC_CPU ? &counters->vlan_nic : &counters->vlan_queue))++;
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
	handed = place == ON_NIC_CPU ? &counters->direct : &counters->handed;
hand_over:
	reason = ROW(malformed);
	if (frame.tags.tagged && (frame.tags.vid == 0 || frame.tags.vid == port->pvid) && strip_tag(ctx) < 0)
		goto bridge;
	count(handed, length);
	return XDP_REDIRECT;

bridge:
	length = bpf_xdp_get_buff_len(ctx);
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
