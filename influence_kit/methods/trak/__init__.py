"""TRAK."""
