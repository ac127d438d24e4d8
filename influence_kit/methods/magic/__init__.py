"""The exact derivative of a training run in the weights of its examples."""
