"""The addresses and interfaces by which the hosts of a run reach one another. Sends nothing. No torch.

Debian gives a host's own name the address 127.0.1.1. Whoever asks for its own name there and tells the others the answer
is not found; so here a host asks by which of its addresses it reaches the others.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from ipaddress import ip_address

import psutil

from lime_dist.cluster.nodelist import planned_hosts
from lime_dist.errors import LayoutError
from lime_dist.lifecycle.launcher import Place, host_name

_ELSEWHERE = "192.0.2.1"  # RFC 5737 keeps it free: only the route towards it is asked for
_PEERS_ASKED = 3
_BACKLOG = 4096  # ranks that come in one moment


def meeting_host(place: Place, environment: Mapping[str, str] = os.environ) -> str:
    """Where this host finds rank 0: MASTER_ADDR, or on rank 0's own host, where that may mean loopback, its address.

    Raises: LayoutError when the run has other hosts and that address cannot be known.
    """
    name = environment["MASTER_ADDR"]
    if _is_loopback(name) or not _is_loopback(resolve(name)):
        return name
    spans_hosts = _spans_hosts(place, environment)
    address = None if spans_hosts is False else next(_own_addresses(place, environment), None)
    if address is None and spans_hosts:
        raise LayoutError(
            f"environment: MASTER_ADDR={name} is {resolve(name)} on {host_name(environment)} itself, which the other hosts "
            "do not reach; set an address that all know (in a cluster file under export), or fix /etc/hosts there"
        )
    return address or name


def _spans_hosts(place: Place, environment: Mapping[str, str]) -> bool | None:
    """None where the launcher does not say."""
    if environment.get("LOCAL_WORLD_SIZE", "").isdigit():
        return int(environment["LOCAL_WORLD_SIZE"]) < place.world_size
    hosts = set(planned_hosts(place.world_size, environment).values())
    return None if "" in hosts else len(hosts) > 1


def _own_addresses(place: Place, environment: Mapping[str, str]) -> Iterator[str]:
    """By which others may reach this host, the likeliest first: as another host of the run, then any, is reached."""
    hosts = dict.fromkeys(planned_hosts(place.world_size, environment).values())
    peers = [resolve(host) for host in hosts if host not in ("", host_name(environment))][:_PEERS_ASKED]
    for address in (*peers, _ELSEWHERE):
        source = None if _is_loopback(address) else source_address(address)
        if source is not None and not _is_loopback(source):
            yield source
    only, *others = [*_addresses(), None]
    if only is not None and others == [None]:
        yield only


def _addresses() -> list[str]:
    """IPv4, but for loopback."""
    return [
        own.address
        for addresses in psutil.net_if_addrs().values()
        for own in addresses
        if own.family is socket.AF_INET and not _is_loopback(own.address)
    ]


def choose_interfaces(place: Place, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let gloo use the interface by which this host reaches rank 0's, unless the user has set one.

    Alone it takes the address of the host's own name. NCCL looks at interfaces and prefers InfiniBand, so it is left to
    choose; but lo it takes only when told, and a run on loopback is to open no port to a network.
    Raises: LayoutError when gloo would tell the others a loopback address.
    """
    address = source_address(resolve(meeting_host(place, environment)))
    interface = None if address is None else find_interface(address)
    if interface is not None:
        environment["GLOO_SOCKET_IFNAME"] = environment.get("GLOO_SOCKET_IFNAME") or interface
        if _is_loopback(address):
            environment["NCCL_SOCKET_IFNAME"] = environment.get("NCCL_SOCKET_IFNAME") or f"={interface}"
    elif not environment.get("GLOO_SOCKET_IFNAME") and _is_loopback(resolve(socket.gethostname())):
        raise LayoutError(
            f"environment: host {host_name(environment)} takes its own name for {resolve(socket.gethostname())}, and no "
            f"interface of it leads to MASTER_ADDR={environment['MASTER_ADDR']}; export GLOO_SOCKET_IFNAME there"
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on this host's address `host` alone. Where `host` is no address of this machine (it is translated
    on the way), on the one that leads there. Raises: OSError."""
    address = resolve(host) or host
    try:
        return _listen(address, port)
    except OSError as error:
        own = source_address(address) if error.errno == errno.EADDRNOTAVAIL else None
        if own is None:
            raise
    return _listen(own, port)


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=_BACKLOG)


def resolve(host: str) -> str | None:
    """The first address, IPv4 before IPv6, as whoever connects tries both; None where the name is unknown."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    return str(min(found, key=lambda entry: entry[0] is not socket.AF_INET)[4][0])


def source_address(address: str | None) -> str | None:
    """This host's address on the way to `address`, or None where no way is known."""
    try:
        (family, kind, protocol, _, target), *_ = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # of a datagram socket: it looks up the route
            return probe.getsockname()[0]
    except OSError:
        return None


def find_interface(address: str) -> str | None:
    """The name of the interface that has this address of the host."""
    found = (name for name, own in psutil.net_if_addrs().items() if address in {entry.address for entry in own})
    return next(found, None)


def _is_loopback(host: str | None) -> bool:
    """Of an address, or of the one name that means loopback everywhere."""
    try:
        return host == "localhost" or (host is not None and ip_address(host).is_loopback)
    except ValueError:
        return False
