/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Ethernet and VLAN tags (IEEE 802.3, 802.1Q-2018 clause 9), read only.
 */
#ifndef OFFLOAD_PARSE_H
#define OFFLOAD_PARSE_H

#include <linux/types.h>
#include <linux/if_ether.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "MACs are read as little-endian words"
#endif

#define be16(x) ((__u16)__builtin_bswap16(x))

#define VID_MASK 0x0fff /* of the TCI; PCP and DEI are above */
#define MAC_MASK 0xffffffffffffull
#define GROUP_BIT 1ull /* of the first byte on the wire: multicast and broadcast */

struct vlan_tag {
	__be16 tci;
	__be16 next; /* EtherType of what follows the tag */
};

/* What the filter stage needs to know of a frame. */
struct frame {
	__u64 dst; /* MAC, first byte on the wire lowest */
	__u16 vid; /* of the outer tag; 0 without one */
	__u8 tagged;
	__u8 odd_tags; /* an 802.1ad tag outside, or a second tag: nothing for an access port */
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

	if ((const void *)(eth + 1) > end)
		return -1;
	frame->dst = *(const __u64 *)data & MAC_MASK;
	frame->vid = 0;
	frame->tagged = 0;
	frame->odd_tags = 0;
	if (is_tag(eth->h_proto)) {
		if ((const void *)(tag + 1) > end)
			return -1;
		frame->vid = be16(tag->tci) & VID_MASK;
		frame->tagged = 1;
		frame->odd_tags = eth->h_proto != be16(ETH_P_8021Q) || is_tag(tag->next);
	}
	return 0;
}

#endif
