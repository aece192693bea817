"""Pipelines: every stage in order, resumed where it stands, or told beforehand."""
