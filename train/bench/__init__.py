"""A training step beside the published scripts' own, at equal loss."""
