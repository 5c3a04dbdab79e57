"""TODO: _triton."""
