"""Memories: keys and values with ids, indexes that search them, and attention over what was found."""

from anyattention.memory.clusters import ClusterIndex
from anyattention.memory.exact import ExactIndex
from anyattention.memory.faiss import FaissIndex
from anyattention.memory.mapped import attend_file
from anyattention.memory.mapped_file import MappedMemory, write_memory
from anyattention.memory.measures import Measure
from anyattention.memory.product_keys import ProductKeys
from anyattention.memory.usearch import UsearchIndex

__all__ = [
    "ClusterIndex",
    "ExactIndex",
    "FaissIndex",
    "MappedMemory",
    "Measure",
    "ProductKeys",
    "UsearchIndex",
    "attend_file",
    "write_memory",
]
