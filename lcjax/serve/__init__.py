"""Decoding: sampling, the batched engine, and where models come from."""

from lcjax.serve.engine import Completion, Engine, Generator, Piece, Request
from lcjax.serve.report import Report
from lcjax.serve.sampling import Sampling

__all__ = ["Completion", "Engine", "Generator", "Piece", "Report", "Request", "Sampling"]
