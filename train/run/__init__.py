"""A stage from its first step to its last: loop, checkpoints, metrics, caches."""
