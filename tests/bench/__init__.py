"""Benchmarks: figures to compare with each other, never to pass or fail by. They need root."""
