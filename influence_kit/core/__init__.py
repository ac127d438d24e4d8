"""What all other folders build on: checks of arguments, memory, ranks, processes, random state."""
