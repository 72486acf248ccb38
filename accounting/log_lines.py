"""Log lines: one JSON object per line on stderr, for changes of state and for what went wrong."""

import logging
import sys
from datetime import UTC, datetime

import msgspec


class JsonLine(logging.Formatter):
    """`at` (RFC 3339, UTC), `level`, `from`, `text`, and `trace` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "from": record.name,
            "text": record.getMessage(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def start() -> None:
    """Send everything from `info` on to stderr. Called once, by a process's entry point."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLine())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
