"""Similarity of activations."""
