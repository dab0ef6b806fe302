"""A request's body: scanned, held back, edited."""
