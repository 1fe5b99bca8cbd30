"""The package's logger: its lines are shown until the user sets up logging of their own."""

from __future__ import annotations

import logging
import sys


class _UntilConfigured(logging.Handler):
    """Writes to stderr as long as the root logger has no handler, so that no line is shown twice."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            sys.stderr.write(self.format(record) + "\n")


logger = logging.getLogger("sctraj")
if not logger.handlers:
    logger.addHandler(_UntilConfigured())
    if logger.level == logging.NOTSET:  # else the user was here first
        logger.setLevel(logging.INFO)
