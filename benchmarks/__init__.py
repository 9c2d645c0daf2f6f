"""Benchmarks: each checks its numbers before it times anything."""
