"""Logging of podferry's daemons: one JSON object per line on standard error."""

from __future__ import annotations

import sys

import structlog


def log_json_lines() -> None:
    """Set structlog up for this process: level, time (ISO 8601, UTC), what is bound in the context, errors with traceback."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
