"""Clusters to a selection: columns, steps as they are written, recipes, and the funnel that runs them."""
