"""Representer points."""
