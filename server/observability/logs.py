"""The log: one JSON object per line on stderr, for all libraries too."""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType

import structlog

log = structlog.stdlib.get_logger("castor")


def configure_logging(level: str) -> None:
    """One JSON object per line on stderr for everything, Castor's own and its libraries' (these from warnings on)."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel("WARNING")
    logging.getLogger("castor").setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _log_exception
    sys.unraisablehook = lambda lost: _log_exception(lost.exc_type, lost.exc_value, lost.exc_traceback)
    threading.excepthook = lambda lost: _log_exception(lost.exc_type, lost.exc_value, lost.exc_traceback)


def _log_exception(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """What Python prints of an exception that nothing catches, as a line of the log."""
    logging.getLogger("castor").error("uncaught exception", exc_info=(kind, error or kind(), trace))
