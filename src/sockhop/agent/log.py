"""The agent's log on stderr: for people on a terminal, JSON lines for machines."""

import json
import logging
import sys
import time

__all__ = ["set_up_log"]


class _Json(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, message."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        return json.dumps(fields, ensure_ascii=False)


def set_up_log(*, verbose: bool = False) -> None:
    """Send the log of sockhop to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
        )
    else:
        handler.setFormatter(_Json())
    log = logging.getLogger("sockhop")
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False
