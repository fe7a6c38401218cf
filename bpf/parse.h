/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Ethernet and VLAN tags (IEEE 802.3, 802.1Q-2018 clause 9), and what is behind them, read only.
 */
#ifndef OFFLOAD_PARSE_H
#define OFFLOAD_PARSE_H

#include <linux/types.h>
#include <linux/if_ether.h>
#include <linux/in.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "MACs are read as little-endian words"
#endif

#define be16(x) ((__u16)__builtin_bswap16(x))

#define VID_MASK 0x0fff /* of the TCI; PCP and DEI are above */
#define MAC_MASK 0xffffffffffffull
#define GROUP_BIT 1ull /* of the first byte on the wire: multicast and broadcast */

/* Sizes and places in the headers of RFC 791, 3.1, and RFC 8200, 3. */
#define IPV4_BYTES 20
#define IPV4_PROTOCOL 9
#define IPV6_NEXT_HEADER 6

struct vlan_tag {
	__be16 tci;
	__be16 next; /* EtherType of what follows the tag */
};

/* A frame's tags. */
struct tags {
	__u16 vid; /* of the outer one; 0 without one */
	__u8 tagged;
	__u8 service; /* the outer one is of 802.1ad */
	__u8 second;  /* there is another one inside */
};

/* What the filter stage needs to know of a frame. */
struct frame {
	__u64 dst; /* MAC, first byte on the wire lowest */
	struct tags tags;
};

static __always_inline int is_tag(__be16 type)
{
	return type == be16(ETH_P_8021Q) || type == be16(ETH_P_8021AD);
}

/* 0, or -1 when the frame ends inside its own headers. */
static __always_inline int parse_frame(const void *data, const void *end, struct frame *frame)
{
	const struct ethhdr *eth = data;
	const struct vlan_tag *tag = data + sizeof(*eth);
	struct tags tags = {};

	if ((const void *)(eth + 1) > end)
		return -1;
	frame->dst = *(const __u64 *)data & MAC_MASK;
	if (is_tag(eth->h_proto)) {
		if ((const void *)(tag + 1) > end)
			return -1;
		tags.tagged = 1;
		tags.vid = be16(tag->tci) & VID_MASK;
		tags.service = eth->h_proto != be16(ETH_P_8021Q);
		tags.second = is_tag(tag->next);
	}
	frame->tags = tags;
	return 0;
}

/*
 * Whether this is TCP over IPv4 or IPv6, fragments of IPv4 included, so that no flow of them is split in two.
 * Behind IPv6 extension headers or a second tag nothing is looked for: those flows are not TCP all along.
 */
static __always_inline int is_tcp(const void *data, const void *end, int tagged)
{
	const __u8 *network = data + sizeof(struct ethhdr) + (tagged ? sizeof(struct vlan_tag) : 0);
	const __be16 *type = (const void *)network - sizeof(*type);

	if ((const void *)(network + IPV4_BYTES) > end)
		return 0;
	if (*type == be16(ETH_P_IP))
		return network[IPV4_PROTOCOL] == IPPROTO_TCP;
	return *type == be16(ETH_P_IPV6) && network[IPV6_NEXT_HEADER] == IPPROTO_TCP;
}

/*
 * Whether a port of this mode must not have these tags, whatever the VID is. Under a VID of a trunk
 * a second tag is the guest's own; under a tag that is taken off it would come out as a VID of its
 * own choice.
 */
static __always_inline int tags_refused(const struct tags *tags, int trunk, __u16 pvid)
{
	if (tags->service)
		return 1;
	return tags->second && (!trunk || tags->vid == 0 || tags->vid == pvid);
}

/* 01:80:c2:00:00:0x: never forwarded by a bridge (802.1Q-2018, 8.6.3). */
static __always_inline int is_link_local(__u64 mac)
{
	return (mac & 0xf0ffffffffffull) == 0x0000c28001ull;
}

#endif
