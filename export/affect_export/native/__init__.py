"""ONNX graphs as programs of the native library.

graph    reads an ONNX graph: static shapes of one stream, constants worked out, pairs of Q/DQ taken off
fuse     puts several of its nodes into one instruction's
lower    goes through the nodes and makes the instructions; `views`, `builder`, `ops` and `convs` are its parts
place    where every array lies in the scratch memory, and which copies are not needed
program  the file
"""

from affect_export.native.lower import lower
from affect_export.native.program import Program, to_bytes

__all__ = ["Program", "lower", "to_bytes"]
