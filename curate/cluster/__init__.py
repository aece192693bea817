"""From embeddings to clusters, and to the near-duplicates inside each."""
