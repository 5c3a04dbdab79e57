"""TODO: compiled."""
