"""A pool of tars to vectors: members read, images decoded, both towers run, one sidecar a shard."""
