"""What chance chooses in a test run."""

from __future__ import annotations

import datetime
import os

SEED = int(os.environ.get("PODFERRY_SEED") or datetime.datetime.now(datetime.UTC).date().toordinal())
"""Chooses what `make test` runs of matrices that are too long for it."""
