"""TracIn and gradient similarity."""
