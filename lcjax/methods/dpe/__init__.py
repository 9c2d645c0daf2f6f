"""DPE with detected numbers (arXiv 2504.18857): what is measured of a model, plan files, the model under them."""

from lcjax.methods.dpe.plan import DetectedDPE, Plan

__all__ = ["DetectedDPE", "Plan"]
