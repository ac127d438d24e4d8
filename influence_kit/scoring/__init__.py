"""From two sides of a method to the scores that are kept."""
