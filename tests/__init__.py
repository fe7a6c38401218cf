"""Tests of offload, one directory per tier; each says which privilege it needs."""
