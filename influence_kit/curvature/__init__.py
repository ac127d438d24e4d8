"""The curvature of a model's loss: measured, approximated, inverted."""
