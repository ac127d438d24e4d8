"""The models of the settings. Letters: n examples, t positions, h heads, w width, c outputs."""
