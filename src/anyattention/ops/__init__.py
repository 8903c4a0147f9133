"""Operations: tensors in, tensors out; one folder each, with its implementations side by side."""

from anyattention.ops.attend import attend, explain

__all__ = ["attend", "explain"]
