"""Models from a hub (Hugging Face and its mirrors) or an address: which files, and how they are downloaded whole."""
