"""Kills and interrupts at random moments of everything that writes files; ``make kills``."""
