"""Tower, projector and language model made one: composed, run forward, and what of it learns."""
