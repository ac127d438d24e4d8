"""Saves and restores the state of the user's model and process."""
