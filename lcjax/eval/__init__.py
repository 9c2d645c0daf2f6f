"""Evaluation: measures by context length, their results and plots."""
