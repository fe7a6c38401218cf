/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the programs and the controller share: the values of every map.
 *
 * These structs are defined here and nowhere else. The controller builds its
 * views of them from the descriptions that the compiler hands back, and a test
 * pins their sizes: keep every field naturally aligned and leave no padding.
 *
 * Integers are in the host's byte order. VIDs are 0..4094, where 0 stands for
 * untagged and for priority-tagged frames (IEEE 802.1Q-2018, 9.6).
 */
#ifndef OFFLOAD_ABI_H
#define OFFLOAD_ABI_H

#include <linux/types.h>

/* A port's queue is served on whichever CPU the NIC's own RX queue runs. */
#define CPU_OF_NIC 0xffffffffu

#define NO_PORT 0xffffffffu

/* Port flags. */
#define PORT_RUNNING  (1u << 0) /* frames may be handed over; otherwise all go to the bridge */
#define PORT_TRUNK    (1u << 1) /* a second tag under a VID of the trunk's is the guest's own business */
#define PORT_NO_FRAGS (1u << 2) /* frames of several buffers are lost: on tun, and before Linux 6.3 */
/*
 * The NIC may give a frame in several buffers (jumbo MTU, header split). Only then the whole length
 * is asked for: that call costs as much as all the rest of the classification.
 */
#define PORT_FRAGS_POSSIBLE (1u << 3)
#define PORT_BYPASS (1u << 4) /* tc may hand it frames past the bridge */
#define PORT_SOCKETS (1u << 5) /* an AF_XDP port with sockets on the NIC's own queues */
#define PORT_GRO     (1u << 6) /* frames are left to the stack's GRO, and tc hands over what it makes of them */
#define PORT_GRO_TCP (1u << 7) /* those of TCP are */

/* One row of the port table. Two aligned words, each of which is stored whole. */
struct port {
	__u32 cpu;     /* the CPU that serves the queue, or CPU_OF_NIC */
	__u16 pvid;    /* frames of this VID are delivered without their tag; 0: an untagged port */
	__u16 flags;   /* PORT_* */
	__u32 ifindex; /* device the frames are for; 0 when it is away */
	__u16 max_len; /* longest frame the device takes, in bytes, Ethernet header included, FCS not */
	__u16 queue;   /* the operator's number for the queue; 0: none */
};

/* Frames and their bytes, tags included, as the wire has them without FCS. */
struct tally {
	__u64 packets;
	__u64 bytes;
};

/*
 * What became of a port's frames. One copy per CPU; only that CPU writes it. The host's interface and
 * the uplink are ports of their switch as well: what an uplink "sends" is what came in from the wire.
 */
struct port_counters {
	/* Towards the port. */
	struct tally socket;   /* NIC's CPU: handed to an AF_XDP socket on the NIC's queue */
	struct tally direct;   /* NIC's CPU: handed to the device */
	struct tally queued;   /* NIC's CPU: sent to the queue's CPU */
	struct tally handed;   /* queue's CPU: handed to the device */
	struct tally returned; /* queue's CPU: given to the bridge after all */
	struct tally left;     /* NIC's CPU: left to GRO */
	struct tally merged;   /* tc: what came out of GRO, handed to the device past the bridge */
	__u64 merged_buffers;  /* in how many pieces that came */
	struct tally bridged;  /* tc: the bridge's frames that the port's mode admits */
	struct tally local;    /* tc: handed over by another port of the switch, past the bridge */
	/* From the port. */
	struct tally tx_local;  /* tc: to another port of the switch, past the bridge */
	struct tally tx_direct; /* tc: to the uplink, past the bridge */
	struct tally tx_bridge; /* tc: to the bridge */
	/* Frames that were dropped. */
	__u64 vlan_nic;    /* for their tags on the NIC's CPU */
	__u64 vlan_queue;  /* for their tags on the queue's CPU */
	__u64 vlan_bridge; /* for their tags on the way to the port */
	__u64 vlan_sent;   /* for their tags on the way from the port */
	__u64 spoofed;     /* from an address that is not the port's */
	__u64 guard_dhcp;  /* of a DHCP server */
	__u64 guard_ra;    /* of a router: advertisements and redirects */
	__u64 link_local;  /* to 01:80:c2:00:00:0x, either way */
	__u64 host;        /* that the host's own stack sent to the port's device */
};

/* The default queue: frames of one NIC that went to the bridge, by reason. One copy per CPU. */
struct nic_counters {
	struct tally broadcast;
	struct tally multicast;
	struct tally no_filter; /* nobody's MAC and VID */
	struct tally malformed; /* too short for its own headers */
	struct tally paused;    /* the port takes no frames from its queue just now */
	struct tally no_device; /* the port's device is away */
	struct tally no_cpu;    /* the queue's CPU is not set up */
	struct tally too_big;   /* longer than the port's MTU allows */
	struct tally frags;     /* several buffers, and the device takes one */
};

/* The inner end of an AF_XDP port: what its programs saw. One copy per CPU. */
struct channel_counters {
	struct tally handed;      /* to a socket, which may have had no room */
	struct tally no_consumer; /* dropped: nobody had put a socket there */
};

/* What a virtual function of a NIC serves: one row for each. */
struct served {
	__u32 port; /* whose frames the NIC sorts into it; NO_PORT: nobody's */
	__u16 vid;  /* of the tag that the NIC took off; 0: none */
	__u16 unused;
};

/* What a virtual function had and did not deliver. One copy per CPU. */
struct function_counters {
	struct tally group;    /* dropped: the NIC itself has it as well */
	struct tally stranger; /* dropped: for nobody whom it serves */
	struct tally passed;   /* given to the NIC, as if it had come in there */
};

/* What a device is to its switch. */
#define MEMBER_PORT    1 /* a VM's tap, or the host's end of its veth */
#define MEMBER_HOST    2 /* the switch's end of the host's own interface */
#define MEMBER_UPLINK  3 /* the NIC */
#define MEMBER_CONDUIT 4 /* the outer end of a Python bridge */
#define MEMBER_SILENT  5 /* neither hears nor speaks: a bridge device, a conduit's inner end */
#define MEMBER_FUNCTION 6 /* a virtual function of the NIC; its port is the uplink's, its pvid the VLAN's */

/* What a member may do. */
#define ALLOW_SPOOFING   (1u << 0) /* send from any address */
#define ALLOW_DHCP       (1u << 1) /* answer as a DHCP server */
#define ALLOW_RA         (1u << 2) /* advertise and redirect as a router */
#define ALLOW_LINK_LOCAL (1u << 3) /* send and get 01:80:c2:00:00:0x */
#define MEMBER_TRUNK     (1u << 4) /* tags are admitted by `trunks` */
#define MEMBER_NO_NATIVE (1u << 5) /* a trunk that takes no frames without a tag */
#define MEMBER_BYPASS    (1u << 6) /* its frames may pass by the bridge */

/* A device of a switch. */
struct member {
	__u32 port;    /* its row in `ports` and `port_counters` */
	__u32 network; /* its switch's row in `networks` */
	__u16 role;    /* MEMBER_PORT … MEMBER_SILENT */
	__u16 flags;   /* ALLOW_*, MEMBER_TRUNK, … */
	__u16 pvid;    /* VID of frames without a tag; 0: they stay without */
	__u16 unused;
};

/* Unknown unicast goes to the bridge: a port may have addresses behind it that nobody declared. */
#define NETWORK_ASK_BRIDGE (1u << 0)

/* A switch. */
struct network {
	__u32 uplink;   /* port of the uplink, or NO_PORT */
	__u32 conduit;  /* ifindex of the Python bridge's outer end; 0: the kernel's bridge */
	__u16 untagged; /* VID that untagged frames have inside the kernel's bridge only; 0: none */
	__u16 flags;    /* NETWORK_* */
	__u32 unused;
};

/* An address of a switch's port, in one VLAN. */
struct station_key {
	__u32 network;
	__u8 mac[6];
	__u16 vid; /* 0: the untagged network */
};

#define STATION_EXPECTED 0 /* declared, and not heard yet */
#define STATION_HERE     1 /* heard from its port */
#define STATION_AWAY     2 /* heard from the wire since */

struct station {
	__u32 port;
	__u32 ifindex; /* the port's device */
	__u32 state;   /* STATION_*: flipped by the programs alone */
	__u32 moves;   /* how often it was */
	__u64 since;   /* CLOCK_MONOTONIC in ns; 0 before the first time */
};

/* The VIDs of a trunk: bit VID % 64 of word VID / 64. */
struct vlan_set {
	__u64 words[64];
};

/* A station's state has changed. */
struct news {
	__u32 network;
	__u32 port;
	__u32 state;
	__u16 vid;
	__u8 mac[6];
};

#endif
