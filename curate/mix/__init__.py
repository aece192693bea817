"""Instruction and text-only sources to one training set."""
