"""Questions to stored vectors: prompts through the model's text tower, linear heads, and a search over all rows."""
