"""Every error that anyattention raises on purpose.

Each one is an `AttentionError` and also the built-in that fits (`ValueError`, `TypeError`, ...), so that
callers may catch either. All carry the same fields: which argument, what was expected, what came.
"""

__all__ = [
    "AttentionError",
    "DimensionMismatchError",
    "GraphStructureError",
    "IndexRangeError",
    "InvalidConfigError",
    "InvalidInputError",
    "InvalidMaskError",
    "MatrixOperationError",
    "MissingExtraError",
    "NumericalInstabilityError",
    "OutOfMemoryError",
    "SparseMatrixError",
    "TrainingError",
    "UnsupportedError",
]


class AttentionError(Exception):
    """Base of all errors of this package.

    Args:
        message: the whole text; where it is empty, it is written from the fields.
        argument: the name of the argument at fault.
        expected: what it should have been.
        actual: what came.
        hint: how to mend it.

    Example:
        >>> str(AttentionError(argument="heads", expected="a divisor of 8", actual=3))
        'heads: expected a divisor of 8, got 3'
    """

    def __init__(
        self,
        message: str = "",
        /,
        *,
        argument: str | None = None,
        expected: object = None,
        actual: object = None,
        hint: str | None = None,
    ) -> None:
        self.argument = argument
        self.expected = expected
        self.actual = actual
        self.hint = hint
        text = message or f"{argument}: expected {expected}, got {actual}"
        super().__init__(f"{text}. {hint}" if hint else text)


class DimensionMismatchError(AttentionError, ValueError):
    """A tensor has the wrong rank or a size that does not fit the other arguments."""


class InvalidConfigError(AttentionError, ValueError):
    """A setting is out of range, contradicts another one, or cannot be used by the mechanism."""


class InvalidInputError(AttentionError, ValueError):
    """An argument has the wrong dtype, device, type or value."""


class InvalidMaskError(AttentionError, TypeError, ValueError):
    """A mask is not boolean, or its shape is ambiguous."""


class GraphStructureError(AttentionError, ValueError):
    """An edge names a node that does not exist, or a graph does not fit its features."""


class IndexRangeError(GraphStructureError, IndexError):
    """An index array of a graph or pattern names a place that does not exist, or one twice that must be there once.

    The arrays of a Graph are checked when it is built: they were changed afterwards, perhaps by another thread.
    """


class SparseMatrixError(AttentionError, ValueError):
    """A sparse matrix has an unsupported layout or inconsistent parts."""


class MatrixOperationError(AttentionError, ArithmeticError):
    """A matrix operation has no answer for this input (rank too low, singular)."""


class NumericalInstabilityError(AttentionError, ArithmeticError):
    """A result that should be finite is NaN or infinite."""


class OutOfMemoryError(AttentionError, MemoryError):
    """An allocation would not fit, or did not fit, in memory.

    Args:
        size: bytes that were asked for; None where the allocator did not say.
    """

    def __init__(self, message: str = "", /, *, size: int | None = None, **fields: object) -> None:
        super().__init__(message, **fields)  # pyright: ignore[reportArgumentType]  # same fields
        self.size = size


class TrainingError(AttentionError, RuntimeError):
    """A training step was asked for that cannot be taken, such as an update without gradients."""


class UnsupportedError(AttentionError, NotImplementedError, ValueError):
    """A combination of arguments that the chosen implementation does not compute."""


class MissingExtraError(AttentionError, ImportError):
    """An optional dependency is not installed; the text names the extra that brings it."""
