"""The errors and warnings of the package: what was got, what there is, what to do."""


class InvalidArgumentError(AssertionError, ValueError):
    """A wrong argument.

    A ``ValueError``; also an ``AssertionError``, because Captum raises one in the same situations
    and its users may catch it.
    """


class FixedAttributeError(InvalidArgumentError, AttributeError):
    """An assignment to an attribute that is read-only or that does not exist."""


class ChangedError(InvalidArgumentError):
    """Weights, data, a loss or a model that differ from those that the stored results are of."""


class LabelError(InvalidArgumentError):
    """A label that is not the index of a class; the message names the example."""


class UnknownLayerError(ValueError, AttributeError):
    """A layer name that the model does not have (Captum raises ``AttributeError`` for it)."""


class NonFiniteError(ValueError):
    """A score that is NaN or infinite; the message names the example and the layer."""


class CurvatureError(ValueError):
    """A damped curvature that is singular or indefinite, or a solver that fails on it."""


class DampingWarning(UserWarning):
    """A damping so small that the scores have little to do with the gradients."""


class PassAgain(Exception):  # noqa: N818 - a signal, not an error
    """Something was learnt during a pass that makes its earlier results doubtful: start it again.

    It never reaches a user: methods catch it, drop the results, and start the pass again.
    """


class StorageError(OSError):
    """A file that the system did not let be written or removed: a full disk, a permission."""
