"""VMQ for Linux: a receive queue per virtual machine, with XDP on the NIC."""

__version__ = "0.1.0"
