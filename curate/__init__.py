"""Condense image-text pools into coresets: embed, cluster, select, emit, mix; every derived fact is a sidecar table."""

__version__ = "0.1.0"
