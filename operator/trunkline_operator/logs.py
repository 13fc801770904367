"""The operator's log: one JSON object a line on standard output, with names and never secrets."""

import logging
import sys

from pythonjsonlogger.json import JsonFormatter


def configure_logging(level: str = "INFO") -> None:
    """The same fields as the data plane's: time, level, logger, message, process and extras."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        JsonFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            static_fields={"process": "operator"},
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # They tell of each object and each request; at debug level also what was in it.
    for chatty in ("aiohttp", "kopf", "kubernetes", "websockets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
