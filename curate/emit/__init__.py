"""A selection to shards and tables that others read."""
