"""Mix instruction and text-only sources into one training set."""
