"""Tests with real guests: a distribution's kernel in QEMU on a tap. They need root and QEMU."""
