"""Training: data, mixing, losses, optimizer, scores and the training loop."""
