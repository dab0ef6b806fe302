"""What a model's own files say."""
