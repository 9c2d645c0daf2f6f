"""Spans that grow with the length of a request (MoA, arXiv 2406.14909)."""

import math
from dataclasses import dataclass

from lcjax.cache.base import AttentionCache
from lcjax.cache.room import Room
from lcjax.models.patterns import Pattern, Spans
from pallas_kernels.masks import Mask

BLOCK = 64
UNKNOWN = "elastic spans depend on the request's length: fix it (ModelSpec.at, or MoA.length in a configuration)"


def kept_tokens(alpha: float, beta: float, length: int, block: int = BLOCK) -> int:
    """Tokens that a head with the rule alpha + beta N keeps of requests of N = `length` tokens.

    Whole blocks, at least two: one of first tokens and one of latest. Never more than `length` rounded up to those.
    """
    span = min(int(alpha + beta * length), length)
    return block * math.ceil(max(2 * block, span) / block)


@dataclass(frozen=True)
class Elastic(Pattern):
    """KV head h keeps alphas[h] + betas[h] N tokens of a request of N: its first `block`, and the latest.

    N is fixed when caches are made (prompt and answer), so that no span moves while a text is written; until then
    (`at`) there is neither mask nor cache. The window is exact to the token in prefill too, where the paper's kernel
    cuts it at blocks of 64: what decoding can still see is then what the prompt's own tokens saw.
    """

    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    block: int = BLOCK

    def __post_init__(self):
        if len(self.alphas) != len(self.betas) or not self.alphas:
            raise ValueError(f"Elastic: {len(self.alphas)} alphas and {len(self.betas)} betas; give one of each a head")
        if self.block < 1:
            raise ValueError(f"Elastic.block is {self.block}; it must be at least 1")

    def check(self, num_heads: int, num_kv_heads: int) -> None:
        if len(self.alphas) != num_kv_heads:
            raise ValueError(f"Elastic is made for {len(self.alphas)} KV heads, the model has {num_kv_heads}")

    def at(self, length: int) -> Spans:
        """The spans for requests of up to `length` tokens; a head that keeps them all reads everything."""
        keeps = [kept_tokens(*rule, length, self.block) for rule in zip(self.alphas, self.betas, strict=True)]
        spans = [(0, None) if kept >= length else (self.block, kept - self.block) for kept in keeps]
        return Spans(tuple(sink for sink, _ in spans), tuple(window for _, window in spans))

    def mask(self, num_heads: int, num_kv_heads: int) -> Mask:
        raise ValueError(UNKNOWN)

    def cache(self, room: Room) -> AttentionCache:
        raise ValueError(UNKNOWN)
