"""Tests on kernels that are booted for them, in machines that QEMU emulates.

``kernels.py`` is the table of kernels, ``nics.py`` that of emulated network cards, ``image.py`` makes
the disks and ``machine.py`` the machine. By hand, from the root of the checkout::

    python -m tests.vm 6.1 -- python -m pytest tests/netns/test_links.py
"""
