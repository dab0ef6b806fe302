"""HTTP/1 messages: heads, chunks, replies."""
