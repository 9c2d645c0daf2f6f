"""Checkpoints: tensor files of other projects, and our own training checkpoints."""
