"""Training: the job record, the pure step, and the loop that tells the story."""
