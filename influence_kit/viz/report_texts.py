"""The standing texts of a report: how to read a score, and what a method is called."""

READING = (
    "A positive score marks a proponent: training on that example lowered the loss of the test "
    "example. A negative score marks an opponent: training on it raised that loss. Near 0 it "
    "hardly mattered. The bars compare the scores of one test example."
)
READING_OF_OUTPUT = (
    "A positive score marks a proponent: training on that example raised the output of the test "
    "example that is explained. A negative score marks an opponent: training on it lowered that "
    "output. Near 0 it hardly mattered. The bars compare the scores of one test example."
)
SUSPICION = (
    "The examples that the model had to bend most to fit, the highest score first. Many of them "
    "have a wrong label; others are only rare, or hard."
)


def name_and_formula(method: object) -> tuple[str | None, str | None]:
    """What a method is called, and the first line of its own documentation."""
    if method is None or isinstance(method, str):
        return method, None
    kind = method if isinstance(method, type) else type(method)
    text = kind.__doc__ if isinstance(kind.__doc__, str) else ""
    return kind.__name__, text.strip().partition("\n")[0] or None
