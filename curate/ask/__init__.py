"""Questions to stored vectors: prompts through the model's text tower, linear heads, and searches over all rows."""
