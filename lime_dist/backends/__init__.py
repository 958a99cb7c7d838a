"""The only importers of megatron-core and DeepSpeed.

Both, and what they call of torch, warn of optional packages and coming names at every import and call; a
user can fix none of it, so it is silenced here.
"""

import logging
import warnings

warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\..*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
