"""What others made: published embeddings and their layouts; pictures that lie in no tar yet."""
