"""Influence functions, by how they approximate and invert the curvature."""
