"""What interrupts are called and counted, in the words of several drivers, and who else moves them."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.kernel.host import parse_cpu_list
from offload.kernel.irq import format_cpu_list, irqbalance, parse_interrupts, rx_irqs

# /proc/interrupts of one device each, as hosts have shown it; the last two after drivers' sources.
IGB = """\
            CPU0       CPU1
  40:          0          1  PCI-MSIX-0000:01:00.0    0-edge      eth0
  41:          0          0  PCI-MSIX-0000:01:00.0    1-edge      eth0-rx-0
  42:          0          7  PCI-MSIX-0000:01:00.0    2-edge      eth0-rx-1
  43:          0          0  PCI-MSIX-0000:01:00.0    3-edge      eth0-tx-0
  44:          0          1  PCI-MSIX-0000:01:00.0    4-edge      eth0-tx-1
 NMI:          0          0  Non-maskable interrupts
 ERR:          0
"""
VIRTIO = """\
           CPU0       CPU1
 35:          0          1 PCI-MSIX-0000:00:02.0   0-edge      virtio1-config
 38:          0      97372 PCI-MSIX-0000:00:03.0   1-edge      virtio2-input.0
 39:      66319          0 PCI-MSIX-0000:00:03.0   2-edge      virtio2-output.0
"""
VIRTIO_SHARED = """\
           CPU0       CPU1
 28:          0          0  PCI-MSIX-0000:00:01.0    0-edge      virtio0-config
 29:          0         37  PCI-MSIX-0000:00:01.0    1-edge      virtio0-virtqueues
"""
VMXNET3 = """\
            CPU0       CPU1       CPU2
 56:          0          0        640   PCI-MSI 1572864-edge      eth0-rxtx-0
 57:         18         17         36   PCI-MSI 1572865-edge      eth0-rxtx-1
 60:          0          0          0   PCI-MSI 1572868-edge      eth0-event-2
"""
ENA = """\
           CPU0       CPU1
 27:       5615        969   PCI-MSI 81920-edge      ena-mgmnt@pci:0000:00:05.0
 28:    1482671   35400719   PCI-MSI 81921-edge      eth0-Tx-Rx-0
 29:   35863379    1330827   PCI-MSI 81922-edge      eth0-Tx-Rx-1
"""
I40E = """\
            CPU0       CPU1
 217:          1          0  IR-PCI-MSI 2097152-edge      i40e-0000:04:00.0:misc
 218:       7731          0  IR-PCI-MSI 2097153-edge      i40e-i40e1-TxRx-0
 219:          0       4417  IR-PCI-MSI 2097154-edge      i40e-i40e1-TxRx-1
 224:          5          0  IR-PCI-MSI 2097155-edge      i40e-0000:04:00.0:fdir-TxRx-0
"""
ICE = """\
            CPU0       CPU1
 102:          0         19   IR-PCI-MSIX-0000:17:00.0    0-edge      ice-0000:17:00.0:misc
 104:          3          0   IR-PCI-MSIX-0000:17:00.0    2-edge      ice-enp23s0np0-TxRx-0
 105:          0          4   IR-PCI-MSIX-0000:17:00.0    3-edge      ice-enp23s0np0-TxRx-1
"""
MLX5 = """\
            CPU0       CPU1
  98:      23274          0  IR-PCI-MSIX-0000:01:00.0    0-edge      mlx5_async0@pci:0000:01:00.0
  99:        324       4360  IR-PCI-MSIX-0000:01:00.0    1-edge      mlx5_comp0@pci:0000:01:00.0
 109:          2     395218  IR-PCI-MSIX-0000:01:00.0    2-edge      mlx5_comp1@pci:0000:01:00.0
"""
E1000E = """\
            CPU0       CPU1
  51:   12187473   14354377   PCI-MSI-edge      eth0-rx-0
  52:      96883     106078   PCI-MSI-edge      eth0-tx-0
  53:        292        131   PCI-MSI-edge      eth0
"""
ONE_FOR_ALL = """\
            CPU0       CPU1
  46:     208685     202268   PCI-MSI-edge      eth0
"""
NUMBERED_FROM_ONE = """\
            CPU0       CPU1
  46:     208685     202268   PCI-MSI-edge      eth0-0
  47:     208685     202268   PCI-MSI-edge      eth0-txrx-1
  48:     208685     202268   PCI-MSI-edge      eth0-txrx-2
"""
BARE_NUMBERS = """\
            CPU0       CPU1
  60:          3          0   PCI-MSI 67108864-edge      enp4s0f0np0-0
  61:          0          4   PCI-MSI 67108865-edge      enp4s0f0np0-1
  62:          0          4   PCI-MSI 67108866-edge      enp4s0f0np0-xdp-0
  63:          0          4   PCI-MSI 67108867-edge      enp4s0f0np0-ptp
"""


def names(text: str) -> dict[int, str]:
    """The name of each interrupt, which is the directory in /proc/irq/N."""
    lines = [line.split() for line in text.splitlines()[1:]]
    return {int(words[0][:-1]): words[-1] for words in lines if words[0][:-1].isdigit()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(IGB, {0: (41,), 1: (42,)}, id="igb"),
        pytest.param(VIRTIO, {0: (38,)}, id="virtio"),
        pytest.param(VIRTIO_SHARED, {}, id="virtio_with_one_vector_for_all_queues"),
        pytest.param(VMXNET3, {0: (56,), 1: (57,)}, id="vmxnet3"),
        pytest.param(ENA, {0: (28,), 1: (29,)}, id="ena"),
        pytest.param(I40E, {0: (218,), 1: (219,)}, id="i40e"),
        pytest.param(ICE, {0: (104,), 1: (105,)}, id="ice"),
        pytest.param(MLX5, {0: (99,), 1: (109,)}, id="mlx5"),
        pytest.param(E1000E, {0: (51,)}, id="e1000e"),
        pytest.param(ONE_FOR_ALL, {0: (46,)}, id="one_interrupt"),
        pytest.param(NUMBERED_FROM_ONE, {}, id="numbers_that_are_not_queues"),
        pytest.param(BARE_NUMBERS, {0: (60,), 1: (61,)}, id="bare_numbers"),
        pytest.param("CPU0", {}, id="none"),
    ],
)
def test_queues_by_the_names_of_interrupts(text: str, expected: dict[int, tuple[int, ...]]) -> None:
    assert rx_irqs(names(text)) == expected


def test_an_interface_that_shares_its_device_cannot_be_told() -> None:
    assert rx_irqs(names(IGB) | {50: "eth1-rx-0"}) == {}


def test_counts_are_by_cpu() -> None:
    assert parse_interrupts(VMXNET3)[57] == (18, 17, 36)
    assert set(parse_interrupts(IGB)) == {40, 41, 42, 43, 44}
    offline = IGB.replace("CPU1", "CPU3")
    assert parse_interrupts(offline)[42] == (0, 0, 0, 7)


@pytest.mark.parametrize("text", ["0", "0-3,6", "1,3,5-7", "31-33"])
def test_lists_of_cpus(text: str) -> None:
    assert format_cpu_list(parse_cpu_list(text)) == text
    assert format_cpu_list(reversed(parse_cpu_list(text))) == text


def test_no_cpus_are_an_empty_list() -> None:
    assert format_cpu_list(()) == ""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with its first process and another one."""
    for pid, comm in (("1", "systemd"), ("812", "sshd")):
        (tmp_path / "proc" / pid).mkdir(parents=True)
        (tmp_path / "proc" / pid / "comm").write_text(comm + "\n")
    (tmp_path / "run/irqbalance").mkdir(parents=True)
    return tmp_path


def test_irqbalance_is_known_by_its_process(root: Path) -> None:
    assert irqbalance([41, 42], root) is None
    (root / "proc/812/comm").write_text("irqbalance\n")
    said = irqbalance([42, 41], root)
    assert said is not None
    assert "(process 812)" in said
    assert 'IRQBALANCE_ARGS="--banirq=41 --banirq=42"' in said


def test_a_socket_that_irqbalance_left_behind_says_nothing(root: Path) -> None:
    (root / "run/irqbalance/irqbalance700.sock").touch()
    assert irqbalance(root=root) is None
    (root / "proc/1").rename(root / "proc/hidden")  # as hidepid= has it
    assert "irqbalance700.sock" in str(irqbalance(root=root))
