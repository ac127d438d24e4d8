"""Losses, margins and test measures, one value per example."""
