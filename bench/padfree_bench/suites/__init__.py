"""TODO: suites."""
