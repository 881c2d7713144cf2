"""Training: data, mixing, losses, optimizer, scores, the loop."""
