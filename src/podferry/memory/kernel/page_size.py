"""How large a page of this node's memory is. On the wire a page has 4096 bytes, whatever node it comes from
(`podferry.core.precopy.PAGE`)."""

import os

PAGE = os.sysconf("SC_PAGE_SIZE")
