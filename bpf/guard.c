// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * tc at the egress of a port's device: what the bridge sends towards a VM.
 *
 *   1. a device that is nobody's                             -> as it is
 *   2. an 802.1ad tag, or a second tag                       -> drop
 *   3. untagged port: no tag                                 -> deliver
 *                     VID 0                                  -> deliver without the tag
 *                     any other VID                          -> drop
 *   4. VLAN port: its own VID                                -> deliver without the tag
 *                 anything else                              -> drop
 *
 * A tag may stand in the frame or beside it, in the skb. What XDP redirects
 * does not come this way, so the fast path pays nothing.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include "abi.h"
#include "parse.h"

/* The port behind a device, by ifindex. */
BPF_TABLE("hash", __u32, struct guard, guards, MAX_PORTS);
/* What became of each port's frames, by port id. */
BPF_TABLE("percpu_array", __u32, struct port_counters, port_counters, MAX_PORTS);

/* EtherType at the MAC header plus 12: skb->protocol may already be the inner one. */
static __always_inline int type_at(struct __sk_buff *skb, __u32 offset, __be16 *type)
{
	return bpf_skb_load_bytes(skb, offset, type, sizeof(*type));
}

int guard(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex, length = skb->len;
	struct port_counters *counters;
	__be16 outer = 0, inner = 0, tci = 0;
	struct guard *mode;
	__u16 vid = 0;
	int tagged;

	mode = guards.lookup(&ifindex);
	if (!mode)
		return TC_ACT_UNSPEC;
	counters = port_counters.lookup(&mode->port);
	if (!counters)
		return TC_ACT_UNSPEC;

	if (type_at(skb, 2 * ETH_ALEN, &inner) < 0)
		goto drop;
	tagged = skb->vlan_present;
	if (tagged) {
		outer = skb->vlan_proto;
		vid = skb->vlan_tci & VID_MASK;
	} else if (is_tag(inner)) {
		tagged = 1;
		outer = inner;
		if (type_at(skb, 2 * ETH_ALEN + 2, &tci) < 0 || type_at(skb, 2 * ETH_ALEN + 4, &inner) < 0)
			goto drop;
		vid = be16(tci) & VID_MASK;
	}

	if (tagged && (outer != be16(ETH_P_8021Q) || is_tag(inner)))
		goto drop;
	if (vid != mode->pvid)
		goto drop;
	if (tagged && bpf_skb_vlan_pop(skb) < 0)
		goto drop;
	counters->bridged.packets++;
	counters->bridged.bytes += length;
	return TC_ACT_UNSPEC;
drop:
	counters->vlan_bridge++;
	return TC_ACT_SHOT;
}
