"""Random weights that both sides of the parity test make from a tensor's name alone (numpy only)."""

import zlib

import numpy as np


def weight(name: str, shape: tuple[int, ...], norm_offset: float) -> np.ndarray:
    """float32 weights that keep activations of order one and attention sharp enough to show wrong positions."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("norm.weight"):
        return (1.0 - norm_offset + 0.2 * draw).astype(np.float32)
    if len(shape) == 1:
        return (0.3 * draw).astype(np.float32)
    if "embed_tokens" in name:
        return draw.astype(np.float32)
    sharpness = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
    return (sharpness * draw * shape[1] ** -0.5).astype(np.float32)


def tokens(length: int, vocab_size: int) -> np.ndarray:
    """int32 [1, length]; a shorter length is a prefix."""
    return np.random.default_rng(0).integers(0, vocab_size, (1, 128)).astype(np.int32)[:, :length]
