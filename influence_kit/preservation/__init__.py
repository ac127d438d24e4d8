"""The state of a user's model and process, kept and given back."""
