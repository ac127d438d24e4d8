"""What all rooms build on: arguments, memory, ranks, processes, random state, tables."""
