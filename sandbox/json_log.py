"""The form of a sandbox's log: one JSON line an event on stdout, secrets cut out; not what is logged."""

import json
import logging
import sys
import time
from collections.abc import Iterable, Mapping

_runner = logging.getLogger("runner")


class JsonLines(logging.Formatter):
    """One JSON object a line, with the keys of the control plane's lines (shared/log.py) so that one query reads both.

    An error is shown as its type and message, never as a traceback.

    Secrets made known to `hide` are cut out of the finished line, so that none gets past in a message, a
    field or an error of any library.
    """

    def __init__(self) -> None:
        super().__init__()
        self._common: dict[str, str | int] = {}
        self._hidden: set[str] = set()

    def add_fields(self, fields: Mapping[str, str | int]) -> None:
        """Put these on every line from now on."""
        self._common.update(fields)

    def hide(self, values: Iterable[str]) -> None:
        for value in values:
            self._hidden |= {value, json.dumps(value)[1:-1]} - {""}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "level": record.levelname,
            "message": record.getMessage(),
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "service": "sandbox",
            "logger": record.name,
            **self._common,
            **getattr(record, "fields", {}),
        }
        if record.exc_info and (error := record.exc_info[1]):
            line["error"] = describe(error)
        shown = json.dumps(line, default=str)
        for value in sorted(self._hidden, key=len, reverse=True):
            shown = shown.replace(value, "[hidden]")
        return shown


def configure_logging() -> JsonLines:
    """Send every log to stdout as JSON lines: the runner's from INFO up, libraries' from WARNING up."""
    formatter = JsonLines()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a line that cannot be made would be shown on stderr, its secrets with it
    _runner.setLevel(logging.INFO)
    # ANTHROPIC_LOG raises these to DEBUG when the SDK is imported, and DEBUG shows request bodies.
    for name in ("anthropic", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return formatter


def describe(error: BaseException) -> str:
    """Type and message; for a group, those of what it holds."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(describe(inner) for inner in error.exceptions)
    return f"{type(error).__name__}: {error}"


def say(level: int, message: str, **fields: object) -> None:
    """Log a line of the runner's with fields of its own."""
    _runner.log(level, message, extra={"fields": fields})
