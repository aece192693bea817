"""Samples to batches: sources, prompts and label masks, packing."""
