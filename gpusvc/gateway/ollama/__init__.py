"""Ollama's API, translated to what engines speak: OpenAI's chat, completions and embeddings, llama-server's infill."""
