"""The compiled kernels: the library, the C structures, and the calls that fill them."""

from anyattention.native.load import (
    MissingKernelsWarning,
    NativeInfo,
    available,
    info,
    large_empty,
    library,
    multiplies_fast,
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
    "multiplies_fast",
    "num_threads",
    "run",
]
