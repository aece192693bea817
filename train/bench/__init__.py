"""Compare a training step with that of the published scripts, at equal loss."""
