"""Attention within groups of a row, shifted by half a group in some heads (LongLoRA, arXiv 2309.12307)."""

from dataclasses import dataclass

import numpy as np

from lcjax.cache.base import AttentionCache
from lcjax.cache.room import Room
from lcjax.models.patterns import Pattern
from pallas_kernels.masks import Causal, Intervals, Mask, per_head


@dataclass(frozen=True)
class ShiftedGroups(Pattern):
    """KV head h reads its own group of `group` tokens up to itself; where shifted[h], groups begin half a group later.

    A key expires at the end of its group. The shifted heads' first and last groups are halves: nothing wraps around, so
    that nothing is read from the future. For rows of up to `length` tokens in training; decoding is full attention.
    """

    group: int
    length: int
    shifted: tuple[bool, ...]

    def __post_init__(self):
        if self.group < 2 or self.group % 2:
            raise ValueError(f"ShiftedGroups.group is {self.group}; it must be even, to be shifted by half of it")
        if self.length < 1 or not self.shifted:
            raise ValueError(f"ShiftedGroups: length {self.length} must be positive and shifted name every KV head")

    def check(self, num_heads: int, num_kv_heads: int) -> None:
        if len(self.shifted) != num_kv_heads:
            raise ValueError(f"ShiftedGroups is made for {len(self.shifted)} KV heads, the model has {num_kv_heads}")

    def mask(self, num_heads: int, num_kv_heads: int) -> Mask:
        half = self.group // 2
        column = np.arange(-(-self.length // half), dtype=np.int32)  # in half groups
        plain = Causal() & Intervals(half, (column // 2 + 1) * self.group)
        shifted = Causal() & Intervals(half, (column + 1) // 2 * self.group + half)
        if len({*self.shifted}) == 1:
            return shifted if self.shifted[0] else plain
        return per_head((plain, shifted), [self.shifted[h * num_kv_heads // num_heads] for h in range(num_heads)])

    def cache(self, room: Room) -> AttentionCache:
        raise ValueError("ShiftedGroups is for training: decode with full attention (Attention.pattern = None)")
