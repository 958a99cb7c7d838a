"""Hosts on this machine: network namespaces, each with one network card on a common switch, whose rate can be limited.

The namespaces have no names: each lives while a process has it open, so nothing is left of them however that ends.
Needs Linux, root and iproute2. Knows nothing of ranks.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_CLONE_NEWNET = 0x40000000  # of <sched.h>; Python has os.unshare and os.setns from 3.12 on
_CARD = "eth0"
_MTU = 9000  # as clusters set it: headers are below 1 % of what travels
# What the kernel hands to the limit at once. A small message waits behind one such packet of another connection, and
# the bucket holds two: with one, the time between timer and refill is lost, and the rate falls below what was asked for.
_PACKET_BYTES = 32768
BUCKET_BYTES = 2 * _PACKET_BYTES  # what a card that has been idle sends at once
_LONGEST_QUEUE = "50ms"


@dataclass(frozen=True, kw_only=True)
class CardBytes:
    """What has gone over a host's network card, headers included."""

    sent: int
    received: int

    def __sub__(self, other: CardBytes) -> CardBytes:
        return CardBytes(sent=self.sent - other.sent, received=self.received - other.received)


@dataclass(frozen=True, kw_only=True)
class Host:
    """One of the hosts that `hosts` gives; for the process that has made them and its forks."""

    index: int
    _namespace: int  # file descriptors
    _switch: int

    @property
    def address(self) -> str:
        return f"10.77.0.{self.index + 1}"

    @property
    def _port(self) -> str:
        return f"port{self.index}"

    def enter(self) -> None:
        """Move this process here. Call on the main thread, before there are others."""
        _enter(self._namespace)

    def card_bytes(self) -> CardBytes:
        """So far; call from within."""
        counters = psutil.net_io_counters(pernic=True, nowrap=False)[_CARD]
        return CardBytes(sent=counters.bytes_sent, received=counters.bytes_recv)

    def limit(self, bytes_per_second: float | None) -> None:
        """Let the card send and receive that much each way, both at once; None: as fast as it can."""
        for namespace, device in ((self._namespace, _CARD), (self._switch, self._port)):
            with _inside(namespace):
                _limit(device, bytes_per_second)


def why_no_hosts() -> str | None:
    """Why no hosts with limited cards can be made on this machine, or None."""
    missing = [name for name in ("ip", "tc") if not shutil.which(name, path=_PATH)]
    if missing:
        return f"{' and '.join(missing)} (iproute2) not installed"
    try:
        with hosts(1) as (host,):
            host.limit(10**6)
    except (OSError, AttributeError) as error:  # the second: no Linux
        return f"needs root and Linux network namespaces ({error})"
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"
    return None


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Hosts whose cards meet at a switch; within, the calling thread is in the switch's namespace and has no other network.

    Raises: OSError, CalledProcessError.
    """
    with ExitStack() as stack:
        stack.enter_context(_coming_back())
        switch = _new_namespace(stack)
        namespaces = [_new_namespace(stack) for _ in range(count)]
        _enter(switch)
        _run("ip", "link", "add", "switch", "type", "bridge")
        _run("ip", "link", "set", "switch", "up")
        made = [Host(index=index, _namespace=fd, _switch=switch) for index, fd in enumerate(namespaces)]
        for host in made:
            _plug_in(host)
        yield made


def _plug_in(host: Host) -> None:
    options = ("mtu", str(_MTU), "gso_max_size", str(_PACKET_BYTES))
    namespace = f"/proc/{os.getpid()}/fd/{host._namespace}"
    _run("ip", "link", "add", host._port, *options, "type", "veth", "peer", "name", _CARD, *options, "netns", namespace)
    _run("ip", "link", "set", host._port, "master", "switch", "up")
    with _inside(host._namespace):
        _run("ip", "address", "add", f"{host.address}/24", "dev", _CARD)
        _run("ip", "link", "set", "lo", "up")
        _run("ip", "link", "set", _CARD, "up")


def _limit(device: str, bytes_per_second: float | None) -> None:
    if bytes_per_second is None:
        _run("tc", "qdisc", "replace", "dev", device, "root", "noqueue")
        return
    rate = f"{round(8 * bytes_per_second)}bit"
    bucket = ("burst", str(BUCKET_BYTES), "latency", _LONGEST_QUEUE)
    _run("tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, *bucket)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": _PATH})


# ---- namespaces of the calling thread


def _new_namespace(stack: ExitStack) -> int:
    _call("unshare", _CLONE_NEWNET)
    namespace = _open_namespace()
    stack.callback(os.close, namespace)
    return namespace


def _open_namespace() -> int:
    return os.open(Path(f"/proc/self/task/{threading.get_native_id()}/ns/net"), os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def _inside(namespace: int) -> Iterator[None]:
    with _coming_back():
        _enter(namespace)
        yield


@contextmanager
def _coming_back() -> Iterator[None]:
    before = _open_namespace()
    try:
        yield
    finally:
        _enter(before)
        os.close(before)


def _enter(namespace: int) -> None:
    _call("setns", namespace, _CLONE_NEWNET)


def _call(function: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
