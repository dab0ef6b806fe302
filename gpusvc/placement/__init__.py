"""Which GPUs a model gets, and how room is made for it."""
