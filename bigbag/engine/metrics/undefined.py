"""What is said where the data do not define a metric."""

from __future__ import annotations

import logging
from functools import cache

logger = logging.getLogger("bigbag.engine.metrics")


@cache
def leave_out(names: str, reason: str) -> None:
    """Log why metrics are absent; once, since a run asks again every epoch."""
    logger.warning("left out of the metrics: %s (%s)", names, reason)
