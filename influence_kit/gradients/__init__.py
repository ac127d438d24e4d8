"""Per-example gradients of a loss: one form a parameter, captured layer by layer."""
