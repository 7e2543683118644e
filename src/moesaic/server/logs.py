"""The log of a server: lines for people or JSON objects, on standard error.

It does not know what is logged; nobody may log what is in a request.
"""

from __future__ import annotations

import json
import logging
import sys
import time

__all__ = ["start_logging"]


def start_logging(as_json: bool = False) -> None:
    """Write the log of Moesaic, and warnings of the libraries below, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    for name in ("moesaic", "uvicorn", "asyncio", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if name == "moesaic" else logging.WARNING)
        logger.propagate = False


class _Json(logging.Formatter):
    """An object per line: time, level, message, and what the record has in `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        entry.update(getattr(record, "fields", {}))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)
