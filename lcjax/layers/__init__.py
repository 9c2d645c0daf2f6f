"""Layers of the decoder: each declares its weights once (shape, axes, init) and knows no backend, mesh or family."""
