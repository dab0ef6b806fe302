"""What the routes are answered from."""
