"""Text to training batches: corpora, tokenizers and the input pipeline."""
