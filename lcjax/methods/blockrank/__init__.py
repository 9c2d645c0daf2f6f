"""BlockRank (arXiv 2510.05396): in-context ranking by the attention of one layer."""

from lcjax.methods.blockrank.method import BlockRank

__all__ = ["BlockRank"]
