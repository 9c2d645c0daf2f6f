"""Evaluation: tasks at a token budget, their scores, and reports."""
