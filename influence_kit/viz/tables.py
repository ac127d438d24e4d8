"""How scores are written."""


def score_text(score: float) -> str:
    """A score with its sign and three significant digits: ``+0.0312``, ``-1.20e+04``."""
    return f"{float(score):+#.3g}".rstrip(".")
