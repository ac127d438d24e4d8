"""DVEmb."""
