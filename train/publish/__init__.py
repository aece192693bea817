"""Trained runs and released checkpoints to folders that others load."""
