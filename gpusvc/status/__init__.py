"""What people and programs are shown of models and GPUs."""
