"""The package's logger, whose lines are shown unless the user sets up logging."""

from __future__ import annotations

import logging
import sys


class _UntilConfigured(logging.Handler):
    """A handler that writes to stderr only while the root logger has none, so that no line is shown twice."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            sys.stderr.write(self.format(record) + "\n")


logger = logging.getLogger("sctraj")
if not logger.handlers:
    logger.addHandler(_UntilConfigured())
    if logger.level == logging.NOTSET:  # otherwise the user has set a level already
        logger.setLevel(logging.INFO)
