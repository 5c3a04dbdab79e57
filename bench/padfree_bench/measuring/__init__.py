"""TODO: measuring."""
