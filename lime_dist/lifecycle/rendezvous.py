"""Opens the store over which ranks find each other: on rank 0's host, at MASTER_ADDR and MASTER_PORT.

torchrun's agent has opened it already; else rank 0 does, listening at that address alone.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from lime_dist.errors import LayoutError
from lime_dist.lifecycle.ending import OUTCOME_VARIABLE
from lime_dist.lifecycle.launcher import Place
from lime_dist.lifecycle.network import listen, meeting_host


def open_store(
    place: Place, timeout: timedelta, environment: Mapping[str, str] = os.environ, *, wait_for_all: bool
) -> dist.TCPStore:
    """`timeout`: of this and of every wait at the store. `wait_for_all`: return when all ranks have come.

    Raises: LayoutError; torch's DistError when rank 0 is not found, or others do not come, in time.
    """
    host, port = meeting_host(place, environment), master_port(environment)
    is_server = place.rank == 0 and not is_agents(environment)
    listener = None
    if is_server:
        with naming_taken_port(environment):
            listener = listen(host, port)
        host = listener.getsockname()[0]
    return dist.TCPStore(
        host,
        port,
        world_size=place.world_size,
        is_master=is_server,
        timeout=timeout,
        wait_for_workers=wait_for_all,
        master_listen_fd=None if listener is None else listener.detach(),
    )


def master_port(environment: Mapping[str, str]) -> int:
    """Raises: LayoutError."""
    port = environment["MASTER_PORT"]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise LayoutError(f"environment: MASTER_PORT={port} is no port; set a number from 1 to 65535")
    return int(port)


def is_agents(environment: Mapping[str, str]) -> bool:
    """Whether torchrun's agent has opened the store."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@contextmanager
def naming_taken_port(environment: Mapping[str, str]) -> Iterator[None]:
    """Raises: LayoutError when rank 0 finds another program at MASTER_PORT; RuntimeError where a job script chose the port,
    and chooses another for its next start."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        taken = f"environment: MASTER_PORT={environment['MASTER_PORT']} is in use on this host"
        if "SLURM_JOB_ID" in environment and OUTCOME_VARIABLE in environment:
            raise RuntimeError(taken) from None
        raise LayoutError(f"{taken}; set another") from None
