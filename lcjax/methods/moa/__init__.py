"""MoA, a mixture of attention spans (arXiv 2406.14909): measured influence, chosen spans, plan files."""

from lcjax.methods.moa.plan import MoA, Plan

__all__ = ["MoA", "Plan"]
