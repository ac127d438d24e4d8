"""Linear maps from gradients to gradients."""
