"""Pipelines: every stage in order, resumed where it stopped, or described beforehand."""
