"""Finds, selects and loads checkpoints."""
