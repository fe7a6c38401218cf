/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a frame would need permission for: answering as a DHCP server, advertising or redirecting
 * as a router. Read only; headers may lie anywhere in the skb.
 *
 * RFC 2131 (DHCP), 8415 (DHCPv6), 1256 and 792 (ICMP router advertisement, redirect), 4861
 * (neighbour discovery), 8200 (IPv6), 7113 (how a guard is evaded: with extension headers and
 * fragments). What hides its upper header from us needs every permission.
 */
#ifndef OFFLOAD_GUARDS_H
#define OFFLOAD_GUARDS_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include "abi.h"
#include "parse.h"

#define ALLOW_GUARDED (ALLOW_DHCP | ALLOW_RA)

#define DHCP_SERVER_PORT   67
#define DHCPV6_SERVER_PORT 547

#define ICMP_REDIRECT             5
#define ICMP_ROUTER_ADVERTISEMENT 9
#define ND_ROUTER_ADVERTISEMENT   134
#define ND_REDIRECT               137

#define NEXT_HOP_BY_HOP  0
#define NEXT_ROUTING     43
#define NEXT_FRAGMENT    44
#define NEXT_AUTH        51
#define NEXT_ICMPV6      58
#define NEXT_DESTINATION 60
#define NEXT_MOBILITY    135
#define NEXT_HIP         139
#define NEXT_SHIM6       140

#define IPV6_HEADER     40
#define EXTENSIONS_MAX  8 /* headers in a row; no stack sends half as many */
#define FRAGMENT_OFFSET 0x1fff /* of IPv4's word: in units of 8 bytes, flags are above */

/* As much of the IPv4 header as matters here. */
struct ipv4_start {
	__u8 version_words; /* version, and the header's length in words of 4 bytes */
	__u8 tos;
	__be16 length;
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 protocol;
};

/* How every IPv6 extension header begins. */
struct extension {
	__u8 next;
	__u8 length;
	__be16 fragment; /* a fragment header's: offset in units of 8 bytes, 3 bits of flags below */
};

/* By the upper header at `offset`; everything when the frame ends before it. */
static __always_inline __u32 guarded_udp(struct __sk_buff *skb, __u32 offset, __u16 server)
{
	__be16 source;

	if (bpf_skb_load_bytes(skb, offset, &source, sizeof(source)) < 0)
		return ALLOW_GUARDED;
	return source == be16(server) ? ALLOW_DHCP : 0;
}

static __always_inline __u32 guarded_icmp(struct __sk_buff *skb, __u32 offset, __u8 advertisement, __u8 redirect)
{
	__u8 type;

	if (bpf_skb_load_bytes(skb, offset, &type, sizeof(type)) < 0)
		return ALLOW_GUARDED;
	return type == advertisement || type == redirect ? ALLOW_RA : 0;
}

static __always_inline __u32 guarded_ipv4(struct __sk_buff *skb, __u32 offset)
{
	struct ipv4_start ip;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) < 0)
		return ALLOW_GUARDED;
	if (be16(ip.fragment) & FRAGMENT_OFFSET) /* nothing without the first fragment */
		return 0;
	offset += (ip.version_words & 0xf) * 4;
	if (ip.protocol == IPPROTO_UDP)
		return guarded_udp(skb, offset, DHCP_SERVER_PORT);
	if (ip.protocol == IPPROTO_ICMP)
		return guarded_icmp(skb, offset, ICMP_ROUTER_ADVERTISEMENT, ICMP_REDIRECT);
	return 0;
}

static __always_inline __u32 guarded_ipv6(struct __sk_buff *skb, __u32 offset)
{
	struct extension header;
	__u8 next;

	if (bpf_skb_load_bytes(skb, offset + 6, &next, sizeof(next)) < 0)
		return ALLOW_GUARDED;
	offset += IPV6_HEADER;
	#pragma unroll
	for (int i = 0; i <= EXTENSIONS_MAX; i++) {
		if (next == IPPROTO_UDP)
			return guarded_udp(skb, offset, DHCPV6_SERVER_PORT);
		if (next == NEXT_ICMPV6)
			return guarded_icmp(skb, offset, ND_ROUTER_ADVERTISEMENT, ND_REDIRECT);
		if (next != NEXT_HOP_BY_HOP && next != NEXT_ROUTING && next != NEXT_FRAGMENT && next != NEXT_AUTH &&
		    next != NEXT_DESTINATION && next != NEXT_MOBILITY && next != NEXT_HIP && next != NEXT_SHIM6)
			return 0;
		if (bpf_skb_load_bytes(skb, offset, &header, sizeof(header)) < 0)
			return ALLOW_GUARDED;
		if (next == NEXT_FRAGMENT) {
			if (be16(header.fragment) >> 3)
				return 0;
			offset += 8;
		} else if (next == NEXT_AUTH) {
			offset += (header.length + 2) * 4;
		} else {
			offset += (header.length + 1) * 8;
		}
		next = header.next;
	}
	return ALLOW_GUARDED;
}

/* ALLOW_DHCP, ALLOW_RA, both or neither. `type` is the EtherType, whose header begins at `offset`. */
static __always_inline __u32 guarded(struct __sk_buff *skb, __be16 type, __u32 offset)
{
	struct vlan_tag tag;

	if (is_tag(type)) {
		if (bpf_skb_load_bytes(skb, offset, &tag, sizeof(tag)) < 0)
			return ALLOW_GUARDED;
		type = tag.next;
		offset += sizeof(tag);
	}
	if (type == be16(ETH_P_IP))
		return guarded_ipv4(skb, offset);
	if (type == be16(ETH_P_IPV6))
		return guarded_ipv6(skb, offset);
	return is_tag(type) ? ALLOW_GUARDED : 0;
}

#endif
