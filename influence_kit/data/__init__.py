"""Batches of training and test examples: which dimension counts examples, and repeated reading."""
