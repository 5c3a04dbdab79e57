"""TODO: reports."""
