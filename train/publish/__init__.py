"""Turn trained runs and released checkpoints into folders that other programs load."""
