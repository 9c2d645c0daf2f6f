"""Spans that grow with the length of a request (MoA, arXiv 2406.14909)."""

import math

BLOCK = 64


def kept_tokens(alpha: float, beta: float, length: int, block: int = BLOCK) -> int:
    """Tokens that a head with the rule alpha + beta N keeps of requests of N = `length` tokens.

    Whole blocks, at least two: one of first tokens and one of latest. Never more than `length` rounded up to those.
    """
    span = min(int(alpha + beta * length), length)
    return block * math.ceil(max(2 * block, span) / block)
