"""What a run tells about itself: metrics, FLOPs, memory and pictures."""
