"""Tests on the real kernel in network namespaces. They need root."""
