"""The compiled kernels: the library, the C structures, and the calls that fill them."""

from anyattention.native.load import (
    MissingKernelsWarning,
    NativeInfo,
    available,
    info,
    large_empty,
    library,
    num_threads,
    run,
)

__all__ = [
    "MissingKernelsWarning",
    "NativeInfo",
    "available",
    "info",
    "large_empty",
    "library",
    "num_threads",
    "run",
]
