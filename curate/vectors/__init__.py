"""Arrays in, arrays out: exact cosines, k-means, near pairs and their spanning forest. No paths, no progress."""
