"""The exceptions of a user's mistake: what was got, what there is, what to do."""


class InvalidArgumentError(AssertionError, ValueError):
    """A wrong argument.

    A ``ValueError``; also an ``AssertionError``, because Captum raises that in the same places and
    its users may catch it.
    """


class LabelError(InvalidArgumentError):
    """A label that names no class, with the example that has it."""


class UnknownLayerError(ValueError, AttributeError):
    """A layer name that the model does not have (Captum raises ``AttributeError`` there)."""


class NonFiniteError(ValueError):
    """A score that is NaN or infinite, with the example and the layer it came from."""


class CurvatureError(ValueError):
    """A damped curvature that is singular or indefinite, or a solver that fails on it."""


class PassAgain(Exception):  # noqa: N818 - no error: what is to be done
    """What was computed so far is in doubt, for what was learnt since: the question starts again.

    Never reaches a user: methods catch it, drop what they made, and start the pass again.
    """
