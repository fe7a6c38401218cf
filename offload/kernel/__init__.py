"""All contact with the kernel: netlink, BPF, ethtool, /proc, /sys, subprocesses. Nothing outside does any."""
