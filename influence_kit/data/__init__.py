"""Batches of training and test examples: where their examples stand, how they are read again."""
