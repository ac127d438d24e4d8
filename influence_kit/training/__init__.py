"""The trace of a training run and its steps."""
