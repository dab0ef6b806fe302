"""What model files tell of a model, and the VRAM that engines take for it."""
