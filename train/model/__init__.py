"""Tower, projector and language model as one model: composing it, running it forward, choosing what is trained."""
