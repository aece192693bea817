"""Samples to batches: sources, prompts (`prompts`) and their ids and labels (`encoder`), packing."""
