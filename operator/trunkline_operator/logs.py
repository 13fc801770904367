"""The operator's log: one JSON object a line on standard output, with names and never secrets."""

import logging
import sys

from pythonjsonlogger.json import JsonFormatter

from trunkline_operator.config import ConfigError


def configure_logging(level: str = "INFO") -> None:
    """The same fields as the data plane's: time, level, logger, message, process and extras.

    Raises ConfigError for a level that there is not.
    """
    if level.upper() not in logging.getLevelNamesMapping():
        raise ConfigError(f"{level!r} is no log level: DEBUG, INFO, WARNING or ERROR")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        JsonFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            static_fields={"process": "operator"},
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # They tell of each object and each request; at debug level also what was in it.
    for chatty in ("aiohttp", "kopf", "kubernetes", "websockets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
