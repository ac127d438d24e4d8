"""The models of the settings. Shapes: n examples, t positions, h heads, w width, c outputs."""
