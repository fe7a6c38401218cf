// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The virtual switch: tc programs on every device of a switch, whichever bridge is behind them.
 *
 * Inside, a frame carries the VID of its VLAN as an 802.1Q tag beside it, in the skb; frames of the
 * untagged network carry none. Checksums and segments that are still to be made stay so.
 *
 * sent    ingress of a port's device: what a VM sends; and the host, at its interface's other end
 *   1. tags that the port's mode cannot have, any of 802.1ad      -> drop
 *   2. to 01:80:c2:00:00:0x                                       -> drop
 *   3. from an address that is not the port's                     -> drop
 *   4. of a DHCP server, of a router, or hidden from these guards -> drop
 *   5. the tag made to say the VLAN; the sender is here from now on
 *   6. to a group                                                 -> bridge
 *   7. to the port itself                                         -> ends here
 *   8. to a port that was heard                                   -> its device
 *   9. to an address that is not on this switch                   -> uplink
 *  10. anything else, and ports that may not pass by the bridge   -> bridge
 *
 * wire    ingress of the uplink: what XDP passed
 *   1. an 802.1ad tag, a second tag behind VID 0, the bridge's own VID -> drop
 *   2. a VID 0 tag taken off; a station that is heard here is away from now on
 *   3. to the host                                                -> its interface
 *   4. to a port that has frames merged (GRO), which they are now -> its device
 *   5. anything else                                              -> bridge
 *
 * guard   egress of a port's device: what anybody sends towards a VM or the host
 *   1. what the host's own stack sends on the device              -> drop
 *   2. a VLAN that the port's mode does not have                  -> drop
 *   3. to 01:80:c2:00:00:0x                                       -> drop
 *   4. to an address that is somebody else's: flooded             -> ends here
 *   5. the tag taken off where the port has it not                -> deliver
 *
 * strayed ingress of a NIC's virtual function: what XDP did not deliver there
 *   1. to a group, which the NIC has too, or to nobody here       -> drop
 *   2. the tag put back that the NIC took off                     -> the NIC, as if it had come in there
 *
 * unwrap  ingress of a conduit: what a Python bridge sends, with the port to go out of as an 802.1ad tag
 * silence both ways of a device that neither hears nor speaks     -> drop
 *
 * Drops 2 to 4 of `sent` and 3 of `guard` are subject to what the port is allowed. "bridge" is the
 * kernel's, or the conduit to the Python one, which gets the sending port as an 802.1ad tag.
 *
 * What is done here to a frame for a port, XDP does in vmq.c to unicast from the wire.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include "abi.h"
#include "guards.h"
#include "parse.h"

/* The devices of all switches, by ifindex. */
BPF_F_TABLE("hash", __u32, struct member, members, MAX_MEMBERS, BPF_F_NO_PREALLOC);
/* The switches, by number. */
BPF_TABLE("array", __u32, struct network, networks, MAX_NETWORKS);
/* Which addresses the ports have, and where they were heard last. */
BPF_F_TABLE("hash", struct station_key, struct station, stations, MAX_STATIONS, BPF_F_NO_PREALLOC);
/* The VIDs of trunks, by port id. */
BPF_F_TABLE("hash", __u32, struct vlan_set, trunks, MAX_PORTS, BPF_F_NO_PREALLOC);
/* The ports, by port id. */
BPF_F_TABLE("array", __u32, struct port, ports, MAX_PORTS, BPF_F_MMAPABLE);
/*
 * The ports' devices, by port id; the kernel clears the slot of a device that goes. The same as
 * `devices` in vmq.c: a devmap serves programs of one type only.
 */
BPF_TABLE("devmap", __u32, struct bpf_devmap_val, ends, MAX_PORTS);
/* What became of each port's frames, by port id. */
BPF_TABLE("percpu_array", __u32, struct port_counters, port_counters, MAX_PORTS);
/* Stations that changed their state. bcc's BPF_RINGBUF_OUTPUT would not say what is in it. */
struct news_table_t {
	int key;
	struct news leaf;
	void *(*ringbuf_reserve)(u64);
	void (*ringbuf_submit)(void *, u64);
	u32 max_entries;
};
__attribute__((section("maps/ringbuf"))) struct news_table_t news = { .max_entries = NEWS_BYTES };

/* In skb->tc_index, between the ingress of one device and the egress of another. */
#define PAST_BRIDGE 1
#define MERGED 2 /* the same, from the wire by way of GRO */

/* A frame as it is read from its skb. */
struct sent_frame {
	__u64 dst, src; /* MACs, first byte on the wire lowest */
	struct tags tags;
	__u16 tci;     /* of the outer tag; 0 without one */
	__be16 type;   /* behind the outer tag */
	__u32 offset;  /* of that type's header */
	__u32 length;  /* with all tags */
	__u32 packets; /* that it will be on a wire */
};

/* 0, or -1 when the frame ends inside its own headers. A real device's outer tag is beside the frame. */
static __always_inline int read_frame(struct __sk_buff *skb, struct sent_frame *frame)
{
	struct ethhdr eth;
	struct vlan_tag tag;
	__be16 outer;

	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)) < 0)
		return -1;
	__builtin_memset(frame, 0, sizeof(*frame));
	__builtin_memcpy(&frame->dst, eth.h_dest, ETH_ALEN);
	__builtin_memcpy(&frame->src, eth.h_source, ETH_ALEN);
	frame->type = eth.h_proto;
	frame->offset = sizeof(eth);
	frame->length = skb->len;
	frame->packets = skb->gso_segs ?: 1;
	if (skb->vlan_present) {
		outer = skb->vlan_proto;
		frame->tci = skb->vlan_tci;
		frame->length += sizeof(tag);
	} else if (is_tag(eth.h_proto)) {
		if (bpf_skb_load_bytes(skb, sizeof(eth), &tag, sizeof(tag)) < 0)
			return -1;
		outer = eth.h_proto;
		frame->tci = be16(tag.tci);
		frame->type = tag.next;
		frame->offset += sizeof(tag);
	} else {
		return 0;
	}
	frame->tags.tagged = 1;
	frame->tags.vid = frame->tci & VID_MASK;
	frame->tags.service = outer != be16(ETH_P_8021Q);
	frame->tags.second = is_tag(frame->type);
	return 0;
}

static __always_inline void count(struct tally *tally, const struct sent_frame *frame)
{
	tally->packets += frame->packets;
	tally->bytes += frame->length;
}

/* The station of an address in a VLAN of a network. */
static __always_inline struct station *find_station(__u32 network, __u64 mac, __u16 vid)
{
	struct station_key key = { .network = network, .vid = vid };

	__builtin_memcpy(key.mac, &mac, ETH_ALEN);
	return stations.lookup(&key);
}

/* Flip a station's state, and tell. Should the ring be full, the table has it still. */
static __always_inline void set_state(struct station *station, __u32 state, const struct member *member,
				      __u64 mac, __u16 vid)
{
	struct news *told;

	station->state = state;
	station->moves++;
	station->since = bpf_ktime_get_ns();
	told = news.ringbuf_reserve(sizeof(*told));
	if (!told)
		return;
	told->network = member->network;
	told->port = station->port;
	told->state = state;
	told->vid = vid;
	__builtin_memcpy(told->mac, &mac, ETH_ALEN);
	news.ringbuf_submit(told, 0);
}

static __always_inline int trunk_has(const struct member *member, __u16 vid)
{
	__u32 port = member->port;
	struct vlan_set *set;

	if (!(member->flags & MEMBER_TRUNK))
		return 0;
	set = trunks.lookup(&port);
	return set && set->words[vid / 64] >> vid % 64 & 1;
}

/* Whether a member may send a frame with this VID in its tag; 0 is a frame without. */
static __always_inline int may_send(const struct member *member, __u16 vid)
{
	if (vid == 0)
		return !(member->flags & MEMBER_NO_NATIVE);
	return trunk_has(member, vid);
}

/* Whether a member may get frames of this VLAN; 0 is the untagged network. */
static __always_inline int may_get(const struct member *member, __u16 vid)
{
	if (vid == member->pvid)
		return !(member->flags & MEMBER_NO_NATIVE);
	return vid != 0 && trunk_has(member, vid);
}

/* Where a port's frames can be handed over past the bridge; 0: nowhere. */
static __always_inline __u32 device_of(struct __sk_buff *skb, __u32 id)
{
	struct bpf_devmap_val *device;
	struct port *port;

	port = ports.lookup(&id);
	if (!port || !(port->flags & PORT_BYPASS))
		return 0;
	if (!skb->gso_size && skb->len > port->max_len) /* the bridge drops it, as for every port */
		return 0;
	device = ends.lookup(&id);
	return device ? device->ifindex : 0;
}

/* The verdict that brings a frame to its network's bridge. */
static __always_inline int to_bridge(struct __sk_buff *skb, const struct member *member, __u32 conduit)
{
	if (!conduit)
		return TC_ACT_UNSPEC;
	if (bpf_skb_vlan_push(skb, be16(ETH_P_8021AD), member->port) < 0)
		return TC_ACT_SHOT;
	return bpf_redirect(conduit, 0);
}

int sent(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex, target = 0, forbidden;
	struct port_counters *counters;
	struct sent_frame frame;
	struct station *station;
	struct network *network;
	struct member *member;
	struct tally *tally;
	__u64 *dropped;
	int own, verdict;
	__u16 vid;

	member = members.lookup(&ifindex);
	if (!member)
		return TC_ACT_UNSPEC;
	network = networks.lookup(&member->network);
	counters = port_counters.lookup(&member->port);
	if (!network || !counters)
		return TC_ACT_SHOT;
	skb->tc_index = 0;

	dropped = &counters->vlan_sent;
	if (read_frame(skb, &frame) < 0)
		goto drop;
	if (tags_refused(&frame.tags, member->flags & MEMBER_TRUNK, member->pvid))
		goto drop;
	if (!may_send(member, frame.tags.vid))
		goto drop;
	vid = frame.tags.vid ?: member->pvid;

	dropped = &counters->link_local;
	if (is_link_local(frame.dst) && !(member->flags & ALLOW_LINK_LOCAL))
		goto drop;

	dropped = &counters->spoofed;
	station = find_station(member->network, frame.src, vid);
	own = station && station->port == member->port;
	if (!own && !(member->flags & ALLOW_SPOOFING))
		goto drop;

	if ((member->flags & ALLOW_GUARDED) != ALLOW_GUARDED) {
		forbidden = guarded(skb, frame.type, frame.offset) & ~member->flags;
		dropped = forbidden & ALLOW_RA ? &counters->guard_ra : &counters->guard_dhcp;
		if (forbidden)
			goto drop;
	}

	dropped = &counters->vlan_sent;
	if (frame.tags.tagged && frame.tags.vid == 0 && bpf_skb_vlan_pop(skb) < 0)
		goto drop;
	if (frame.tags.vid == 0 && vid &&
	    bpf_skb_vlan_push(skb, be16(ETH_P_8021Q), (frame.tci & ~VID_MASK) | vid) < 0)
		goto drop;
	if (own && station->state != STATION_HERE)
		set_state(station, STATION_HERE, member, frame.src, vid);

	station = frame.dst & GROUP_BIT ? 0 : find_station(member->network, frame.dst, vid);
	tally = &counters->tx_local;
	verdict = TC_ACT_SHOT;
	if (station && station->port == member->port)
		goto count;
	if (frame.dst & GROUP_BIT || !(member->flags & MEMBER_BYPASS)) {
		target = 0;
	} else if (station && station->state != STATION_AWAY) {
		target = station->state == STATION_HERE ? device_of(skb, station->port) : 0;
		skb->tc_index = target ? PAST_BRIDGE : 0;
	} else if (!(network->flags & NETWORK_ASK_BRIDGE)) {
		tally = &counters->tx_direct;
		target = device_of(skb, network->uplink);
	}
	if (!target)
		tally = &counters->tx_bridge;
	verdict = target ? bpf_redirect(target, 0) : to_bridge(skb, member, network->conduit);
count:
	count(tally, &frame);
	return verdict;
drop:
	*dropped += skb->gso_segs ?: 1;
	return TC_ACT_SHOT;
}

/*
 * Generic XDP with a program that takes several buffers copies a frame and forgets how long its MAC header is
 * (skb_pp_cow_data() in net/core/skbuff.c, since Linux 6.9): the frame seems to begin behind it. The length
 * without that header, which tc takes before it looks for it, tells that this has not happened.
 */
static __always_inline int restore_mac_header(struct __sk_buff *skb)
{
	__u16 begin[ETH_HLEN / 2], mac[ETH_HLEN / 2], differ = 0;

	if (skb->len == skb->wire_len + ETH_HLEN)
		return 0;
	if (bpf_skb_load_bytes_relative(skb, 0, mac, ETH_HLEN, BPF_HDR_START_MAC) < 0 ||
	    bpf_skb_load_bytes(skb, 0, begin, ETH_HLEN) < 0)
		return -1;
	#pragma unroll
	for (int i = 0; i < ETH_HLEN / 2; i++)
		differ |= begin[i] ^ mac[i];
	if (!differ)
		return 0;
	if (bpf_skb_change_head(skb, ETH_HLEN, 0) < 0)
		return -1;
	return bpf_skb_store_bytes(skb, 0, mac, ETH_HLEN, 0);
}

int wire(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex, target = 0, merges = 0;
	struct port_counters *counters;
	struct sent_frame frame;
	struct station *station;
	struct network *network;
	struct member *member, *owner;
	struct port *port;
	__u16 vid;

	member = members.lookup(&ifindex);
	if (!member)
		return TC_ACT_UNSPEC;
	network = networks.lookup(&member->network);
	counters = port_counters.lookup(&member->port);
	if (!network || !counters)
		return TC_ACT_SHOT;
	skb->tc_index = 0;

	if (restore_mac_header(skb) < 0 || read_frame(skb, &frame) < 0)
		goto drop;
	vid = frame.tags.vid;
	if (tags_refused(&frame.tags, 1, 0) || (vid && vid == network->untagged))
		goto drop;
	if (frame.tags.tagged && vid == 0 && bpf_skb_vlan_pop(skb) < 0)
		goto drop;

	station = find_station(member->network, frame.src, vid);
	if (station && station->state != STATION_AWAY) {
		set_state(station, STATION_AWAY, member, frame.src, vid);
		port = ports.lookup(&station->port);
		if (port)
			port->flags &= ~PORT_RUNNING; /* at once: nothing more for a device that it has left */
	}

	station = frame.dst & GROUP_BIT ? 0 : find_station(member->network, frame.dst, vid);
	if (station && station->state == STATION_HERE && member->flags & MEMBER_BYPASS) {
		owner = members.lookup(&station->ifindex);
		port = ports.lookup(&station->port);
		merges = port && port->flags & PORT_RUNNING && port->flags & (PORT_GRO | PORT_GRO_TCP);
		if (owner && (owner->role == MEMBER_HOST || merges))
			target = device_of(skb, station->port);
	}
	if (target) {
		skb->tc_index = merges ? MERGED : PAST_BRIDGE;
		count(&counters->tx_local, &frame);
		return bpf_redirect(target, 0);
	}
	count(&counters->tx_bridge, &frame);
	return to_bridge(skb, member, network->conduit);
drop:
	counters->vlan_sent += skb->gso_segs ?: 1;
	return TC_ACT_SHOT;
}

int guard(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex, way = skb->tc_index;
	struct port_counters *counters;
	struct sent_frame frame;
	struct station *station;
	struct member *member;
	__u64 *dropped;
	__u16 vid;

	member = members.lookup(&ifindex);
	if (!member)
		return TC_ACT_UNSPEC;
	counters = port_counters.lookup(&member->port);
	if (!counters)
		return TC_ACT_SHOT;

	dropped = &counters->host;
	if (skb->ingress_ifindex == 0)
		goto drop;

	dropped = &counters->vlan_bridge;
	if (read_frame(skb, &frame) < 0)
		goto drop;
	vid = frame.tags.vid;
	if (tags_refused(&frame.tags, member->flags & MEMBER_TRUNK, member->pvid) || !may_get(member, vid))
		goto drop;

	dropped = &counters->link_local;
	if (is_link_local(frame.dst) && !(member->flags & ALLOW_LINK_LOCAL))
		goto drop;

	if (!(frame.dst & GROUP_BIT)) {
		station = find_station(member->network, frame.dst, vid);
		if (member->flags & ALLOW_SPOOFING) {
			if (station && station->port != member->port)
				return TC_ACT_SHOT;
		} else if (!station || station->port != member->port || station->state == STATION_AWAY) {
			return TC_ACT_SHOT;
		}
	}

	dropped = &counters->vlan_bridge;
	if (frame.tags.tagged && (vid == 0 || vid == member->pvid) && bpf_skb_vlan_pop(skb) < 0)
		goto drop;
	if (way == MERGED)
		counters->merged_buffers++;
	count(way == MERGED ? &counters->merged : way == PAST_BRIDGE ? &counters->local : &counters->bridged,
	      &frame);
	return TC_ACT_UNSPEC;
drop:
	*dropped += skb->gso_segs ?: 1;
	return TC_ACT_SHOT;
}

int strayed(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct sent_frame frame;
	struct member *member;
	struct port *uplink;

	member = members.lookup(&ifindex);
	if (!member)
		return TC_ACT_SHOT;
	uplink = ports.lookup(&member->port);
	if (!uplink || restore_mac_header(skb) < 0 || read_frame(skb, &frame) < 0)
		return TC_ACT_SHOT;
	if (frame.dst & GROUP_BIT || frame.tags.vid || !find_station(member->network, frame.dst, member->pvid))
		return TC_ACT_SHOT;
	if (frame.tags.tagged && bpf_skb_vlan_pop(skb) < 0)
		return TC_ACT_SHOT;
	if (member->pvid && bpf_skb_vlan_push(skb, be16(ETH_P_8021Q), (frame.tci & ~VID_MASK) | member->pvid) < 0)
		return TC_ACT_SHOT;
	return bpf_redirect(uplink->ifindex, BPF_F_INGRESS);
}

int unwrap(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex, port = skb->vlan_tci;
	struct bpf_devmap_val *device;
	struct member *conduit, *member;

	conduit = members.lookup(&ifindex);
	if (!conduit || !skb->vlan_present || skb->vlan_proto != be16(ETH_P_8021AD))
		return TC_ACT_SHOT;
	device = ends.lookup(&port);
	if (!device)
		return TC_ACT_SHOT;
	member = members.lookup(&device->ifindex);
	if (!member || member->network != conduit->network)
		return TC_ACT_SHOT;
	if (bpf_skb_vlan_pop(skb) < 0)
		return TC_ACT_SHOT;
	skb->tc_index = 0;
	return bpf_redirect(device->ifindex, 0);
}

int silence(struct __sk_buff *skb)
{
	return TC_ACT_SHOT;
}
