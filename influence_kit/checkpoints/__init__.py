"""Checkpoints: finding, choosing and loading them."""
