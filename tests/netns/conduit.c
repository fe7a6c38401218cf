// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What the switch's tc programs do between its members and a Python bridge, and nothing else: so that
 * the bridge can be tested with real TCP, and without them.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <linux/if_ether.h>
#include <linux/if_vlan.h>

#define be16(value) ((__be16)__builtin_bswap16(value))

struct hop {
	__u32 port;    /* the member's id */
	__u32 ifindex; /* the conduit's outer end */
	__u32 vid;     /* the member's access VLAN; 0: none */
};

/* Members by the ifindex of their devices. */
BPF_TABLE("hash", __u32, struct hop, hops, 64);
/* Devices by the id of their members. */
BPF_TABLE("hash", __u32, __u32, devices, 64);

/* Ingress of a member's device. */
int sent(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct hop *hop = hops.lookup(&ifindex);

	if (!hop)
		return TC_ACT_SHOT;
	if (hop->vid && bpf_skb_vlan_push(skb, be16(ETH_P_8021Q), hop->vid) < 0)
		return TC_ACT_SHOT;
	if (bpf_skb_vlan_push(skb, be16(ETH_P_8021AD), hop->port) < 0)
		return TC_ACT_SHOT;
	return bpf_redirect(hop->ifindex, 0);
}

/* Ingress of the conduit's outer end. */
int unwrap(struct __sk_buff *skb)
{
	__u32 port = skb->vlan_tci;
	__u32 *ifindex = devices.lookup(&port);
	struct hop *hop;

	if (!ifindex || skb->vlan_proto != be16(ETH_P_8021AD) || bpf_skb_vlan_pop(skb) < 0)
		return TC_ACT_SHOT;
	hop = hops.lookup(ifindex);
	if (!hop || (hop->vid && bpf_skb_vlan_pop(skb) < 0))
		return TC_ACT_SHOT;
	return bpf_redirect(*ifindex, 0);
}

/* Both ways of the conduit's inner end. */
int silence(struct __sk_buff *skb)
{
	return TC_ACT_SHOT;
}
