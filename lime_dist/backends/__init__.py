"""The only importers of megatron-core and DeepSpeed.

Both, and what they call of torch, warn of optional packages and coming names at every import and call; a
user can fix none of it, so it is silenced here.
"""

import logging
import warnings

warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\..*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")


def is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


DEEPSPEED_LOGGER = logging.getLogger("DeepSpeed")
DEEPSPEED_LOGGER.addFilter(is_error)
