"""From clusters to a selection: columns, steps and how they are written, recipes, and the funnel that runs them."""
