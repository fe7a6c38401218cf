"""What people and programs are shown: the JSON of the API and of ``--json``.

Every view is a frozen value whose field names are part of the public contract.
The field descriptions here are the ones in ``/openapi.json``.

Units, everywhere: packets are frames as the program saw them, bytes are of the
Ethernet frame without its checksum, times are seconds, moments are ISO 8601 in
UTC. Counters never go backwards while the kernel objects live. ``rx`` is towards
the VM and ``tx`` is what the VM sent.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, NonNegativeInt

PortState = Literal["waiting", "active", "paused", "failed"]
PortPath = Literal["queue", "af_xdp", "bridge"]
CounterPath = Literal["queue", "gro", "local", "direct", "af_xdp", "bridge"]
PortSource = Literal["config", "keep", "run"]
QueueState = Literal["undefined", "allocated", "set", "running", "paused", "freed"]
QueueKind = Literal["hardware", "software"]
QueueAsked = Literal["auto", "hardware", "software", "off"]
DeliveryAsked = Literal["auto", "frames", "gro"]
Delivery = Literal["frames", "tcp", "gro"]
StationState = Literal["expected", "here", "away"]

PORT_STATES: tuple[PortState, ...] = get_args(PortState)
QUEUE_STATES: tuple[QueueState, ...] = get_args(QueueState)


class View(BaseModel):
    """Base of all views: frozen, and nothing in it that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Traffic(View):
    """Frames and bytes counted on one path."""

    packets: NonNegativeInt = Field(description="Frames handed over.")
    bytes: NonNegativeInt = Field(description="Bytes of these frames, Ethernet header included.")


class Counters(View):
    """What a port carried, by path, and what was lost, by reason."""

    rx: dict[CounterPath, Traffic] = Field(
        description="Frames towards the VM, by the path that carried them: queue: XDP, from the wire. "
        "gro: the same, where neighbours were merged first. "
        "local: handed over past the bridge, from another port or the host. bridge: the default path. "
        "af_xdp: XDP, from the wire, into the port's sockets on its NIC's queues or its software channel. "
        "A path that this port cannot take is left out."
    )
    tx: dict[CounterPath, Traffic] = Field(
        description="Frames that the VM sent, by the path that carried them: local: to another port or "
        "the host, past the bridge. direct: to the wire, past the bridge. bridge: the default path. "
        "A large frame that is segmented later counts as the frames that it becomes."
    )
    drops: dict[str, NonNegativeInt] = Field(
        description="Frames dropped, by reason. Of what the VM sent: spoofed (not from its own address), "
        "guard_dhcp, guard_ra. Both ways: vlan (a tag that its mode does not allow), link_local. "
        "Towards it: host (sent by the host's own stack on the port's device), ring_full, device_full, "
        "device_down, too_big, no_consumer, nic_rx. A reason that never occurred may be absent."
    )


class PortQueue(View):
    """The VM queue that serves a port."""

    id: NonNegativeInt = Field(
        description="The queue's number on its NIC; never 0, which is the default queue."
    )
    kind: QueueKind = Field(
        description="hardware: the NIC itself steers frames into an RX queue outside RSS, or into a virtual "
        "function. software: XDP steers them after the NIC chose an RX queue."
    )
    cpu: int | None = Field(
        description="The CPU that serves the queue; null: whichever CPU the NIC's RX queue is served by."
    )
    state: QueueState = Field(description="Where the queue is in its life: see the queues.")


class AfXdpChannel(View):
    """One AF_XDP ring pair that a port's consumer may bind or has bound."""

    kind: QueueKind = Field(description="Whether the NIC or XDP fills this channel.")
    ifname: str = Field(description="The device that the socket binds.")
    queue: NonNegativeInt = Field(description="The RX queue of that device.")
    zero_copy: bool | None = Field(
        description="Whether zero copy is in force, as read back from the kernel, which copies on every "
        "veth; null: no socket is bound, or this kernel lists none."
    )
    map_path: str = Field(description="The pinned XSKMAP that the consumer puts its socket into.")
    map_index: NonNegativeInt = Field(description="The slot of that map.")
    consumer: str | None = Field(
        description="Who has put a socket into the map: its user, or `present` where this kernel does not "
        "tell; null: nobody."
    )
    lost: dict[str, NonNegativeInt] = Field(
        description="Frames that the kernel lost on this channel's socket, by ring: rx (it was full), fill "
        "(it had no chunk for the frame, or none that is long enough). Empty where nobody can tell."
    )
    filled: dict[str, NonNegativeInt] = Field(
        default={},
        description="Entries in each of the socket's rings just now: rx, fill, tx, completion. Empty unless "
        "the socket was handed over by the daemon.",
    )
    wants_waking: dict[str, bool] = Field(
        default={},
        description="Whether the kernel waits for the consumer to wake it, by ring: fill, tx. As for filled.",
    )


class AfXdp(View):
    """How a port is reached through AF_XDP instead of a device."""

    channels: list[AfXdpChannel] = Field(description="The channels of the port, the first one preferred.")
    namespace: str = Field(description="The network namespace of the software channel's device.")
    hand_over: str = Field(description="The unix socket at which its consumer gets maps and sockets.")
    handed: dict[QueueKind, NonNegativeInt] = Field(
        description="Frames given to a socket, by the kind of its channel: on the NIC's queues, and at the "
        "software channel. What a socket had no room for is among them, and in the port's drops as ring_full."
    )


class StationView(View):
    """An address of a port, and where it was heard last."""

    mac: str = Field(description="The address, lower-case with colons.")
    state: StationState = Field(
        description="expected: not heard yet, the bridge serves it. here: heard from the port. "
        "away: heard from the wire since, so nothing is handed to the port's device."
    )
    moves: NonNegativeInt = Field(description="How often it was heard from the wire instead of the port.")


class PortView(View):
    """One port: what was asked for, what is in force, and what it carried."""

    name: str = Field(description="The port's name in the config.")
    switch: str = Field(description="The switch that the port is on.")
    device: str | None = Field(description="The tap or the host's end of the veth; null: an AF_XDP port.")
    mac: list[str] = Field(
        description="The VM's addresses, lower-case with colons, the first one is its main one."
    )
    vlan: str | None = Field(
        description="null: untagged. '10': an access port of VLAN 10. 'trunk:10,20/native:1': a trunk."
    )
    weight: int = Field(
        ge=0, le=100, description="Who gets a queue first when they run out; 0: no queue at all."
    )
    source: PortSource = Field(
        description="Where the port is written down. config: the config file. keep: STATE_DIR/ports.d, "
        "survives a reboot. run: RUN_DIR/ports.d, gone with the next boot."
    )
    state: PortState = Field(
        description="waiting: the device is not there yet. active: frames flow. paused: on purpose none do. "
        "failed: the reason says why."
    )
    path: PortPath = Field(description="The path that unicast frames from the wire take to this port now.")
    queue_asked: QueueAsked = Field(
        description="queue of the config; off: the port's frames never pass by the bridge."
    )
    delivery_asked: DeliveryAsked = Field(default="auto", description="delivery of the config.")
    delivery: Delivery | None = Field(
        default=None,
        description="What is done: frames: each is handed over as it comes. gro: all are merged (GRO) first. "
        "tcp: those of TCP are. null: nothing goes by a queue.",
    )
    queue: PortQueue | None = Field(description="The port's queue; null: it is served by the default queue.")
    af_xdp: AfXdp | None = Field(description="Its AF_XDP channels; null: the port has a device.")
    reason: str | None = Field(description="Why the port has not got what was asked for; null: it has.")
    stations: list[StationView] = Field(
        description="Its addresses as the switch has heard them; empty while its device is away."
    )
    moves: NonNegativeInt = Field(
        description="How often one of its addresses was heard from the wire instead, since the daemon "
        "started or the address was declared."
    )
    counters: Counters = Field(description="What the port carried and lost.")


class QueueFilter(View):
    """A destination that a queue receives; both parts match by equality."""

    mac: str = Field(description="Destination MAC, lower-case with colons.")
    vlan: int = Field(ge=0, le=4094, description="VLAN ID; 0: untagged and priority-tagged frames.")


class QueueView(View):
    """One queue of a NIC. The default queue has id 0 and is always listed."""

    nic: str = Field(description="The NIC's name.")
    id: NonNegativeInt = Field(description="The queue's number on this NIC; 0 is the default queue.")
    kind: Literal["default", "hardware", "software"] = Field(
        description="default: the queue that takes what no filter matches. Otherwise as for a port's queue."
    )
    state: QueueState = Field(
        description="allocated: it has its number and its CPU. set: its filters stand, and nothing goes "
        "through it. running: frames do. paused: its port's device is down. undefined: it is not there. "
        "freed: only in events, when a queue is given back."
    )
    since: AwareDatetime | None = Field(
        default=None,
        description="When this state was seen first; null: nobody has looked, as at the default queue.",
    )
    cpu: int | None = Field(
        description="The CPU that serves the queue; null: whichever CPU the NIC's RX queue is served by."
    )
    device: str | None = Field(
        default=None,
        description="The virtual function's device that is this hardware queue; null: none is.",
    )
    rx_queue: int | None = Field(
        default=None,
        description="The NIC's RX queue that a rule in the NIC was read back to give the frames to; null: "
        "there is no such rule.",
    )
    standing: bool | None = Field(
        default=None,
        description="Whether the NIC was read back to sort this queue's frames into it; null: no hardware "
        "queue.",
    )
    vlan_by: Literal["nic", "xdp"] | None = Field(
        default=None,
        description="Who compares a frame's VLAN. nic: the NIC, which strips the tag before XDP sees the "
        "frame; it is read back to have the filter's VLAN where standing is true. xdp: our program, after "
        "the NIC. null: the default queue.",
    )
    ports: list[str] = Field(
        description="The ports it serves; for the default queue, those without one of their own."
    )
    filters: list[QueueFilter] = Field(description="What the queue receives; empty for the default queue.")
    packets: NonNegativeInt = Field(description="Frames that were sorted into this queue.")
    bytes: NonNegativeInt = Field(description="Bytes of these frames.")
    drops: NonNegativeInt = Field(
        description="Frames sorted into the queue and lost before they were handed over."
    )
    drops_by_reason: dict[str, NonNegativeInt] = Field(
        description="The same by reason: ring_full (the queue's CPU was too slow), vlan (a tag that the "
        "port's mode, or for the default queue any mode, does not allow), stranger (the NIC sorted a frame "
        "into a virtual function that is not for its port)."
    )
    not_taken: dict[str, NonNegativeInt] = Field(
        default={},
        description="Frames that came to a virtual function and are lost for nobody, though they did not "
        "go through the queue: group (broadcast and multicast: the NIC itself has them too), passed (to the "
        "default queue). Empty for other queues.",
    )


class Rate(View):
    """What one path carried in a second, on average over a while."""

    packets: float = Field(ge=0, description="Frames per second.")
    bytes: float = Field(ge=0, description="Bytes of these frames per second.")


class PortRates(View):
    """What a port carried and lost."""

    name: str = Field(description="The port's name in the config.")
    switch: str = Field(description="The switch that the port is on.")
    state: PortState = Field(description="As in the port's view.")
    path: PortPath = Field(description="As in the port's view.")
    queue: int | None = Field(description="The number of its queue on its NIC; null: it has none.")
    cpu: int | None = Field(description="The queue's CPU; null: no queue, or the CPU of the NIC's RX queue.")
    rx: dict[CounterPath, Rate] = Field(description="Towards the VM, by path.")
    tx: dict[CounterPath, Rate] = Field(description="What the VM sent, by path.")
    drops: dict[str, float] = Field(description="Frames lost per second, by reason; empty: none.")


class QueueRates(View):
    """What a queue of a NIC took and lost."""

    nic: str = Field(description="The NIC's name.")
    id: NonNegativeInt = Field(description="The queue's number on this NIC; 0 is the default queue.")
    kind: Literal["default", "hardware", "software"] = Field(description="As in the queue's view.")
    state: QueueState = Field(description="As in the queue's view.")
    cpu: int | None = Field(description="As in the queue's view.")
    ports: list[str] = Field(description="As in the queue's view.")
    rate: Rate = Field(description="What was sorted into it.")
    drops: dict[str, float] = Field(description="Frames lost in it per second, by reason; empty: none.")


class CpuShare(View):
    """What a CPU of the host was busy with, whoever made it so."""

    cpu: NonNegativeInt = Field(description="Its number.")
    busy: float = Field(ge=0, le=1, description="The part of the time that it was not idle.")
    softirq: float = Field(ge=0, le=1, description="The part of the time that it spent in softirqs.")
    queues: list[str] = Field(description="The VM queues that it serves, as NIC/ID.")


class TopView(View):
    """What happened in a while: rates instead of counts."""

    seconds: float = Field(gt=0, description="How long that was.")
    ports: list[PortRates] = Field(description="The ports, in the order of the config.")
    queues: list[QueueRates] = Field(description="The queues, the default queues included.")
    cpus: list[CpuShare] = Field(description="The host's CPUs that are online.")


class QueueEvent(View):
    """Something that happened to a VM queue, as it was seen at the end of a reconciliation."""

    time: AwareDatetime = Field(description="When it was seen.")
    nic: str = Field(description="The NIC's name.")
    queue: NonNegativeInt = Field(description="The queue's number on this NIC.")
    kind: QueueKind = Field(description="As for a port's queue.")
    port: str = Field(description="The port that the queue serves, or served.")
    before: QueueState = Field(description="The state that was seen last.")
    after: QueueState = Field(
        description="The state now; the same as before where the queue has moved to another CPU, or has "
        "become one of the other kind."
    )
    cpu_before: int | None = Field(
        description="The CPU that served the queue; null: the NIC's, or the queue was undefined."
    )
    cpu: int | None = Field(description="The CPU that serves it now; null: the NIC's, or it was freed.")
    why: str | None = Field(description="Why, for people; null: nothing is known but that it is so.")
    text: str = Field(description="All of it in plain words.")


class ProgramView(View):
    """The XDP program on a NIC."""

    digest: str = Field(description="Digest of the source and the flags that it was compiled from.")
    tag: str = Field(description="The kernel's tag of the loaded instructions, as bpftool shows it.")
    run_seconds: float | None = Field(
        description="Time spent in the program; null where the kernel does not count it "
        "(kernel.bpf_stats_enabled)."
    )


class CapabilityView(View):
    """An answer to whether a NIC can do something."""

    state: Literal["yes", "no", "unknown"] = Field(description="unknown: nobody could tell.")
    why: str = Field(description="What the answer comes from, or how much of it there is.")
    remedy: str = Field(description="What to do unless the answer is yes; empty: nothing.")


class HardwareQueues(View):
    """Queues that a NIC itself sorts frames into."""

    how: Literal["rules", "functions"] | None = Field(
        description="rules: steering rules in the NIC name an RX queue. functions: SR-IOV virtual functions. "
        "null: it has no hardware queues for VMs, and all VM queues are software ones."
    )
    total: NonNegativeInt = Field(description="How many there are for VMs.")
    in_use: NonNegativeInt = Field(description="How many of them serve a port.")
    why: str | None = Field(description="Why there are none; null: there are.")


class NicView(View):
    """One physical adapter, or what stands for it."""

    name: str = Field(description="The device's name.")
    ifindex: int | None = Field(description="The kernel's number for it; null: there is no such device now.")
    driver: str | None = Field(description="The driver's name, as ethtool shows it; null: unknown.")
    mode_asked: Literal["native", "generic"] = Field(description="xdp_mode of the config.")
    mode: Literal["native", "generic", "offloaded"] | None = Field(
        description="The XDP mode in force, read back from the kernel; null: no program is attached."
    )
    program: ProgramView | None = Field(description="The program that is attached; null: none of ours.")
    filters: NonNegativeInt = Field(description="Filters in the NIC's table.")
    default_queue: dict[str, NonNegativeInt] = Field(
        description="Frames that went to the default queue, by the reason why."
    )
    queues_waiting: NonNegativeInt = Field(description="Ports that want a queue of this NIC and have none.")
    rx_dropped: NonNegativeInt = Field(
        description="Frames that the NIC lost before XDP saw them (rx_dropped)."
    )
    numa_node: int | None = Field(
        default=None, description="The NUMA node that it is at; null: none, or the firmware does not say."
    )
    rx_queues: NonNegativeInt | None = Field(
        default=None, description="RX queues in use, VM queues or not; null: the NIC is no uplink now."
    )
    hardware_queues: HardwareQueues | None = Field(
        default=None, description="Its hardware queues for VMs; null: the NIC is no uplink now."
    )
    capabilities: dict[str, CapabilityView] = Field(
        default={},
        description="What it can do, by name, as the kernel and its driver answered when it was first seen "
        "in its present state; `offload doctor` asks anew.",
    )
    problems: list[str] = Field(description="What is wrong with this NIC, in words; empty: nothing.")


class HostView(View):
    """The host's own interface on a switch."""

    interface: str = Field(description="Its name.")
    present: bool = Field(description="Whether it is there now.")
    mac: str | None = Field(description="Its address, lower-case with colons; null: it is not there.")
    vlan: int | None = Field(description="The VLAN of the host; null: the untagged network.")
    addresses: list[str] = Field(
        description="The IP addresses that it has now, link-local ones left out, as 192.0.2.1/24."
    )
    counters: Counters = Field(description="What it carried and lost; rx is towards the host.")


class NetworkView(View):
    """VLANs of a switch that have the same members. Members of one VLAN reach each other, others do not."""

    vlan: str | None = Field(description="VLAN IDs as 10,20-29; null: the untagged network.")
    ports: list[str] = Field(description="The ports that take part.")
    host: bool = Field(description="Whether the host takes part.")


class DefaultPath(View):
    """What a switch's bridge carried."""

    from_ports: Traffic = Field(description="What ports and the host sent to the bridge.")
    from_wire: Traffic = Field(description="What came from the wire and went to the bridge.")
    to_ports: Traffic = Field(description="What the bridge delivered to ports and the host.")


class ExtensionView(View):
    """An extension of a Python bridge."""

    name: str = Field(description="Its name in the config.")
    state: Literal["on", "off"] = Field(description="Whether it sees frames.")
    reason: str | None = Field(description="Why it is off, or its last failure; null: neither.")
    failures: NonNegativeInt = Field(description="Calls that failed.")
    drops: NonNegativeInt = Field(description="Frames that it dropped.")
    redirects: NonNegativeInt = Field(description="Frames that it sent elsewhere.")


class PythonBridgeView(View):
    """The process that carries a switch's default path."""

    running: bool = Field(description="Whether it runs, and wrote its counters within the last seconds.")
    problem: str | None = Field(description="What is wrong with it, in words; null: nothing.")
    frames: NonNegativeInt = Field(description="Frames that it has read; one to be segmented counts once.")
    drops: dict[str, NonNegativeInt] = Field(
        description="Frames that it has lost or dropped, by reason: ring (they came faster than it reads), "
        "nowhere, flood_limit, too_big, ..."
    )
    restarts: NonNegativeInt = Field(description="How often its worker was started anew.")
    stations: NonNegativeInt = Field(description="Addresses that it knows, declared ones included.")
    extensions: list[ExtensionView] = Field(description="The extensions that see its frames, in their order.")


class SwitchView(View):
    """One virtual switch."""

    name: str = Field(description="The switch's name in the config.")
    type: Literal["private", "internal", "external"] = Field(description="Who may take part.")
    uplink: str | None = Field(description="The NIC of an external switch; null: it has none.")
    bridge: Literal["kernel", "python"] = Field(description="What carries the default path.")
    device: str | None = Field(description="The bridge's network device; null: it has none now.")
    host: str | None = Field(
        description="The host's interface on the switch; null: the host has no part in it."
    )
    host_interface: HostView | None = Field(description="The same with all that belongs to it.")
    ports: list[str] = Field(description="Names of the ports on the switch.")
    networks: list[NetworkView] = Field(description="Its VLANs, and who takes part in each.")
    untagged_vid: int | None = Field(
        description="The VID that the kernel's bridge keeps untagged frames in, which no frame outside may "
        "have; null: it filters no VLANs."
    )
    default_path: DefaultPath = Field(description="What its bridge carried.")
    python_bridge: PythonBridgeView | None = Field(description="Its bridge's process; null: it has none.")
    problems: list[str] = Field(description="What is wrong with this switch, in words; empty: nothing.")


class ConfigStatus(View):
    """The config that is in force, and how the last attempt to load one went."""

    file: str | None = Field(description="The file that it came from.")
    digest: str | None = Field(description="SHA-256 of the text in force, hexadecimal.")
    loaded: AwareDatetime | None = Field(description="When it came into force.")
    load_error: str | None = Field(description="Why the last config was refused; null: it was not.")


class ReconcileStatus(View):
    """How the daemon keeps the kernel and the config the same."""

    runs: NonNegativeInt = Field(description="Reconciliations since the daemon started.")
    errors: NonNegativeInt = Field(description="Those that failed.")
    last_seconds: float | None = Field(description="How long the last one took; null: there was none yet.")
    last_error: str | None = Field(description="What the last one failed with; null: it succeeded.")


class Counts(View):
    """How many of everything there are."""

    nics: NonNegativeInt = Field(description="NICs.")
    switches: NonNegativeInt = Field(description="Switches.")
    ports: NonNegativeInt = Field(description="Ports.")
    ports_active: NonNegativeInt = Field(description="Ports whose state is active.")
    queues: NonNegativeInt = Field(description="VM queues, the default queues not counted.")
    queues_waiting: NonNegativeInt = Field(description="Ports that want a queue and have none.")
    filters: NonNegativeInt = Field(description="Filters on all NICs.")


class TakeoverView(View):
    """Addresses of the host that were moved from NICs, and go back unless that is confirmed in time."""

    nics: dict[str, list[str]] = Field(description="The addresses that were taken, by NIC.")
    deadline: AwareDatetime = Field(description="When they go back.")
    seconds_left: float = Field(description="The same from now on; 0 while they go back.")


class StatusView(View):
    """The daemon at a glance."""

    version: str = Field(description="The version of offload.")
    started: AwareDatetime = Field(description="When the daemon started.")
    pid: int = Field(description="The daemon's process.")
    config: ConfigStatus = Field(description="The config in force.")
    reconcile: ReconcileStatus = Field(description="How reconciliation goes.")
    detached: bool = Field(
        description="The fast path was taken out by `offload detach`; the bridges forward alone."
    )
    takeover: TakeoverView | None = Field(
        default=None, description="A takeover that waits for `offload confirm`; null: none does."
    )
    counts: Counts = Field(description="Totals over all NICs and switches.")
    warnings: list[str] = Field(description="What the operator should know, in words; empty: nothing.")


class ChangeView(View):
    """One thing that was changed in the kernel, or would be."""

    resource: str = Field(description="The thing that changes.")
    before: JsonValue = Field(description="Its value before; null: it was not there.")
    after: JsonValue = Field(description="Its value after; null: it is not there any more.")
    text: str = Field(description="The change in plain words.")


class Outcome(View):
    """What a command did, or with ``dry_run`` would do."""

    changes: list[ChangeView] = Field(
        description="The changes in the order in which they are made; empty: none."
    )
    warnings: list[str] = Field(description="What the operator should know, in words; empty: nothing.")
    takeover: TakeoverView | None = Field(
        default=None, description="What waits for `offload confirm` after these changes; null: nothing."
    )


class ProblemItem(View):
    """One thing that is wrong with the input."""

    path: str = Field(description="Where: dotted, as in ports.web1.vlan.")
    value: str = Field(description="What was found there.")
    allowed: str = Field(description="What would be accepted.")


class ProblemBody(View):
    """The body of every answer that is not a success."""

    error: str = Field(description="The error's class, named for who has to act.")
    message: str = Field(description="What went wrong, for people.")
    exit_code: int = Field(
        description="The exit code of the command line for this: 1 failed, 2 bad input, "
        "3 kernel or driver cannot, 4 privilege missing."
    )
    source: str | None = Field(
        default=None, description="The name of the config that is wrong; null: none is."
    )
    problems: list[ProblemItem] = Field(default=[], description="Everything that is wrong with the input.")


Verdict = Literal["queue", "af_xdp", "bridge", "host", "uplink", "drop"]
VlanAction = Literal["none", "strip", "push"]


class ExplainStep(View):
    """One of the loaded programs that a frame went through."""

    program: str = Field(
        description="uplink, queue, function (bpf/vmq.c), wire, sent, guard, strayed (bpf/switch.c), channel "
        "(bpf/channel.c)."
    )
    device: str = Field(description="Where it stands.")
    counter: str | None = Field(
        description="The counter of bpf/abi.h that such a frame moves; null: none, the frame ends here, or "
        "goes from a virtual function to its NIC."
    )
    port: str | None = Field(
        description="Whose counter that is, uplink:NIC and host:SWITCH among them; null: the device's own."
    )


class ExplainView(View):
    """Where a frame goes, and why."""

    verdict: Verdict = Field(
        description="queue: to a port's device past the bridge. af_xdp: to a port's socket. bridge: the "
        "default path. host: to the host's own stack. uplink: to the wire past the bridge. drop: nowhere."
    )
    port: str | None = Field(
        description="The port that gets it, or for a drop the one whose counter has it; null: none."
    )
    queue: int | None = Field(
        description="The number of the port's queue on its NIC; null: the frame goes through none."
    )
    cpu: int | None = Field(
        description="The CPU that serves that queue; null: whichever CPU the NIC's RX queue is served by."
    )
    vlan_action: VlanAction = Field(
        description="What happens to the outermost tag on the way. push: also a VID 0 made the VLAN's."
    )
    reason: str = Field(description="Why, for people.")
    steps: list[ExplainStep] = Field(
        description="The programs that decided, in order; empty: none of ours is on that device."
    )
