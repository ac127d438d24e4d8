"""What a user's mistake raises, or warns of: what was got, what there is, what to do."""


class InvalidArgumentError(AssertionError, ValueError):
    """A wrong argument.

    A ``ValueError``; also an ``AssertionError``, because Captum raises that in the same places and
    its users may catch it.
    """


class FixedAttributeError(InvalidArgumentError, AttributeError):
    """An attribute that was assigned and is read-only, or that there is not."""


class ChangedError(InvalidArgumentError):
    """Weights, data, a loss or a model that are not those of what an object keeps."""


class LabelError(InvalidArgumentError):
    """A label that names no class, with the example that has it."""


class UnknownLayerError(ValueError, AttributeError):
    """A layer name that the model does not have (Captum raises ``AttributeError`` there)."""


class NonFiniteError(ValueError):
    """A score that is NaN or infinite, with the example and the layer it came from."""


class CurvatureError(ValueError):
    """A damped curvature that is singular or indefinite, or a solver that fails on it."""


class DampingWarning(UserWarning):
    """Scores of a damped curvature that have hardly to do with the gradients they are made of."""


class PassAgain(Exception):  # noqa: N818 - no error: what is to be done
    """What was computed so far is in doubt, for what was learnt since: the question starts again.

    Never reaches a user: methods catch it, drop what they made, and start the pass again.
    """


class StorageError(OSError):
    """A file that the system did not let be written or removed: a full disk, a permission."""
