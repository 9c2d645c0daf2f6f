"""Attention and recurrence kernels for long contexts: arrays in, arrays out."""
