"""The proof that a model gave its VRAM back."""
