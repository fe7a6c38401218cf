"""Tests that run inside a machine, on its emulated network cards. ``tests/vm/test_nics.py`` starts them.

Their files are not called ``test_…``, so that nobody collects them outside.
"""
