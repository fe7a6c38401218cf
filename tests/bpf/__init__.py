"""The BPF programs, run by the kernel on frames that the tests make. Needs root."""
