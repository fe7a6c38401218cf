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

/* Port flags. */
#define PORT_RUNNING  (1u << 0) /* frames may be handed over; otherwise all go to the bridge */
#define PORT_TRUNK    (1u << 1) /* tags are the guest's own business: never dropped for a second one */
#define PORT_NO_FRAGS (1u << 2) /* frames of several buffers are lost: on tun, and before Linux 6.3 */
/*
 * The NIC may give a frame in several buffers (jumbo MTU, header split). Only then the whole length
 * is asked for: that call costs as much as all the rest of the classification.
 */
#define PORT_FRAGS_POSSIBLE (1u << 3)

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

/* What became of a port's frames. One copy per CPU; only that CPU writes it. */
struct port_counters {
	struct tally direct;   /* NIC's CPU: handed to the device */
	struct tally queued;   /* NIC's CPU: sent to the queue's CPU */
	struct tally handed;   /* queue's CPU: handed to the device */
	struct tally returned; /* queue's CPU: given to the bridge after all */
	struct tally bridged;  /* tc: the bridge's frames that the port's mode admits */
	__u64 vlan_nic;        /* dropped for their tags on the NIC's CPU */
	__u64 vlan_queue;      /* dropped for their tags on the queue's CPU */
	__u64 vlan_bridge;     /* dropped for their tags behind the bridge */
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
	struct tally stacked;   /* an 802.1ad tag on its way to a trunk */
};

/* The tc program's view of a port device. */
struct guard {
	__u32 port;
	__u16 pvid;  /* 0: an untagged port */
	__u16 flags; /* PORT_TRUNK, or 0 */
};

#endif
