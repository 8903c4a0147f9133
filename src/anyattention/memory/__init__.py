"""Memories: keys and values with ids, indexes that search them, and attention over what was found."""

from anyattention.memory.exact import ExactIndex
from anyattention.memory.mapped import attend_file
from anyattention.memory.mapped_file import MappedMemory, write_memory
from anyattention.memory.measures import Measure

__all__ = ["ExactIndex", "MappedMemory", "Measure", "attend_file", "write_memory"]
