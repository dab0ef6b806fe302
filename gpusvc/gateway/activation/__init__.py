"""Models are started for requests, and requests wait for them."""
