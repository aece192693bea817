"""From questions to answers to scores."""
