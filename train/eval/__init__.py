"""Questions to answers to scores."""
