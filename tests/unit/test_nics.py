"""What NICs answer, as told to people, and which way to hardware queues follows from it."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from offload.config import QueuesConfig
from offload.doctor import TOPICS
from offload.kernel import nics
from offload.kernel.ethtool import Channels, Ethtool
from offload.kernel.host import Answer
from offload.kernel.netdev import Napi, XdpFeatures
from offload.model import Link

ETH1 = Link(3, "eth1", None, "02:00:00:00:00:01", 1500, True, True, False, None, None, None, 4, 4)
WITH_PROGRAM = replace(ETH1, xdp_mode="native", xdp_prog_id=7)
GONE = replace(ETH1, ifindex=0x7FFFFFFF, name="gone7")
NAPI = Napi(1, 40, None, False, None, None, None)
NATIVE = XdpFeatures.BASIC | XdpFeatures.REDIRECT


def test_a_question_that_fails_is_one_answer_less() -> None:
    with Ethtool() as ethtool:
        found = nics.capabilities(GONE, ethtool, probe=True)
    assert found.keys() == TOPICS.keys()
    assert found["channels"].state == found["mtu"].state == "unknown"
    assert "gone7" in found["channels"].why
    assert found["xdp_mtu"].why != found["channels"].why


@pytest.mark.parametrize(
    ("features", "native", "frags", "target", "zero_copy"),
    [
        pytest.param(XdpFeatures(0), "no", "no", "no", "no", id="nothing"),
        pytest.param(XdpFeatures.BASIC, "no", "no", "unknown", "no", id="without-redirection"),
        pytest.param(NATIVE | XdpFeatures.RX_SG, "yes", "yes", "unknown", "no", id="frags"),
        pytest.param(
            NATIVE | XdpFeatures.NDO_XMIT | XdpFeatures.XSK_ZEROCOPY,
            "yes",
            "no",
            "yes",
            "yes",
            id="zero-copy",
        ),
    ],
)
def test_xdp(features: XdpFeatures, native: str, frags: str, target: str, zero_copy: str) -> None:
    assert {name: answer.state for name, answer in nics.xdp(ETH1, features).items()} == {
        "native_xdp": native,
        "xdp_frags": frags,
        "xdp_redirect_target": target,
        "zero_copy": zero_copy,
    }


def test_a_nic_with_a_program_that_is_no_target_is_none() -> None:
    assert nics.xdp(WITH_PROGRAM, NATIVE)["xdp_redirect_target"].state == "no"


@pytest.mark.parametrize(
    ("answer", "state", "told"),
    [
        pytest.param(nics.channels(Channels(0, 0, 4, 0, 0, 8)), "yes", "4 of at most 8", id="channels"),
        pytest.param(nics.channels(Channels(0, 1, 1, 0, 1, 1)), "no", "1 of at most 1", id="one-queue"),
        pytest.param(nics.rss_table((0, 1, 3) * 4), "yes", "12 slots, to the RX queues 0-1,3", id="rss"),
        pytest.param(nics.rss_table(()), "no", "none", id="no-rss"),
        pytest.param(nics.vlan_in_frame(ETH1, {}), "yes", "XDP sees them", id="tags"),
        pytest.param(
            nics.vlan_in_frame(ETH1, {nics.TAG_STRIPPING: (True, False)}),
            "yes",
            "switches it off",
            id="strips",
        ),
        pytest.param(
            nics.vlan_in_frame(ETH1, {nics.TAG_STRIPPING: (True, True)}), "no", "fixed", id="strips-for-good"
        ),
        pytest.param(
            nics.vlan_in_frame(replace(ETH1, kind="veth"), {nics.TAG_STRIPPING: (True, True)}),
            *("yes", "XDP sees them"),
            id="veth",
        ),
        pytest.param(nics.msix(5, 10), "yes", "5 vectors in use of 10", id="msix"),
        pytest.param(nics.msix(1, None), "no", "1 vector in use", id="one-interrupt"),
        pytest.param(nics.msix(0, None), "no", "no PCI device", id="no-interrupt"),
        pytest.param(nics.numa(1, 2), "yes", "node 1 of 2", id="node"),
        pytest.param(nics.numa(None, 2), "unknown", "firmware", id="which-node"),
        pytest.param(nics.numa(0, 1), "no", "one node", id="one-node"),
        pytest.param(nics.mtu(68, 9216), "yes", "68 to 9216 bytes", id="mtu"),
        pytest.param(nics.mtu(68, 0), "unknown", "no upper limit", id="no-highest-mtu"),
        pytest.param(nics.xdp_mtu(WITH_PROGRAM), "yes", "1500 bytes", id="xdp-runs"),
        pytest.param(nics.xdp_mtu(ETH1), "unknown", "resets", id="xdp-may-run"),
        pytest.param(nics.virtual_functions(7, 2), "yes", "7 virtual functions, 2 made", id="sriov"),
        pytest.param(nics.virtual_functions(0, 0), "no", "none", id="no-sriov"),
        pytest.param(nics.irq_affinity({4: "", 5: ""}), "yes", "interrupts 4-5", id="irqs"),
        pytest.param(
            nics.irq_affinity({4: "", 5: "Permission denied"}),
            "no",
            "interrupt 5: Permission",
            id="irq-refused",
        ),
        pytest.param(nics.irq_affinity({}), "unknown", "down", id="no-irqs"),
        pytest.param(nics.irqs_stay(()), "unknown", "down", id="no-irqs-to-stay"),
        pytest.param(nics.napi_settings({1: replace(NAPI, gro_flush_timeout=0)}), "yes", "1 NAPI", id="napi"),
        pytest.param(nics.napi_settings({1: NAPI}), "no", "for all its queues", id="napi-of-the-device"),
        pytest.param(nics.napi_settings({}), "unknown", "down", id="no-napi"),
    ],
)
def test_answers(answer: Answer, state: str, told: str) -> None:
    assert answer.state == state
    assert told in answer.why


def configuration(*capabilities: tuple[int, int]) -> bytes:
    """A PCI configuration space with capabilities, each with its id and 16 bits of control."""
    space = bytearray(256)
    pointer = 0x34
    for at, (kind, control) in enumerate(capabilities):
        place = 0x40 + 16 * at
        space[pointer] = place
        struct.pack_into("<BBH", space, place, kind, 0, control)
        pointer = place + 1
    return bytes(space)


@pytest.mark.parametrize(
    ("space", "vectors"),
    [
        pytest.param(configuration((0x01, 0), (0x05, 3), (0x11, 0xC009)), 10, id="third-of-three"),
        pytest.param(configuration((0x01, 0)), None, id="none"),
        pytest.param(configuration((0x11, 9))[:64], None, id="not-root"),
        pytest.param(b"", None, id="empty"),
    ],
)
def test_the_size_of_an_msix_table(space: bytes, vectors: int | None) -> None:
    assert nics.msix_vectors(space) == vectors


NO_RULES = Answer("no", "rx-ntuple-filter is off, and fixed")
FUNCTIONS = QueuesConfig(vf_xdp_mode="generic")


@pytest.mark.parametrize(
    ("rules", "functions", "settings", "ours", "how", "why"),
    [
        pytest.param(Answer("yes", "a trial"), (7, 0), FUNCTIONS, False, "rules", "", id="rules-first"),
        pytest.param(
            Answer("unknown", "a trial"), (0, 0), QueuesConfig(), False, "rules", "", id="may-take-rules"
        ),
        pytest.param(NO_RULES, (7, 0), FUNCTIONS, False, "functions", "", id="functions"),
        pytest.param(NO_RULES, (7, 7), FUNCTIONS, True, "functions", "", id="our-functions"),
        pytest.param(
            *(NO_RULES, (7, 1), FUNCTIONS, False, None),
            "it has no steering rules (rx-ntuple-filter is off, and fixed), and its 1 virtual function was "
            "made by somebody else: `echo 0 > /sys/class/net/eth1/device/sriov_numvfs` removes it",
            id="functions-of-others",
        ),
        pytest.param(
            *(NO_RULES, (7, 0), QueuesConfig(), False, None),
            "it has no steering rules (rx-ntuple-filter is off, and fixed), and its virtual functions are "
            "left alone: nics.eth1.queues.vf_xdp_mode: generic would use its 7",
            id="functions-not-asked-for",
        ),
        pytest.param(
            *(NO_RULES, (0, 0), FUNCTIONS, False, None),
            "it has no steering rules (rx-ntuple-filter is off, and fixed), and no virtual functions",
            id="neither",
        ),
    ],
)
def test_the_way_to_hardware_queues(
    rules: Answer, functions: tuple[int, int], settings: QueuesConfig, ours: bool, how: str | None, why: str
) -> None:
    assert nics.way("eth1", 4, rules, *functions, settings, functions_are_ours=ours) == (how, why)


def test_rules_need_a_second_rx_queue() -> None:
    rules = Answer("yes", "a trial")
    how, why = nics.way("eth1", 1, rules, 0, 0, FUNCTIONS, functions_are_ours=False)
    assert how is None
    assert "one RX queue, which is the default queue's (`ethtool -L eth1 combined N`), and no virtual" in why
    assert nics.way("eth1", 1, rules, 7, 0, FUNCTIONS, functions_are_ours=False) == ("functions", "")
