"""A container's own changes over its image, as they move: whole, in passes, the last one while it is frozen.

`TreeSource` looks at the tree and sends; `Receiver` carries out what arrives. The parts below them can be used alone:
`scan` lists a tree, `diff` compares two listings. Any tree can be moved so, an emptyDir volume as well.

Not carried: inode flags (`chattr +i`), project quotas, and open files without a name, which CRIU brings itself.
"""

from podferry.node.upper.copy import copy
from podferry.node.upper.entries import Entry, Manifest
from podferry.node.upper.mappings import shared_files
from podferry.node.upper.overlay import refresh_root
from podferry.node.upper.plan import TreePlan, diff
from podferry.node.upper.receive import Receiver
from podferry.node.upper.scan import scan
from podferry.node.upper.send import TreePolicy, TreeSource
from podferry.node.upper.tree_records import MAX_CHUNK, Summary

__all__ = [
    "MAX_CHUNK",
    "Entry",
    "Manifest",
    "Receiver",
    "Summary",
    "TreePlan",
    "TreePolicy",
    "TreeSource",
    "copy",
    "diff",
    "refresh_root",
    "scan",
    "shared_files",
]
