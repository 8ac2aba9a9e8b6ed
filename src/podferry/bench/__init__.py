"""`podferry bench`: jobs with known behaviour, moved by podferry and by what there was before it, and what both cost."""
