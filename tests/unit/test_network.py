"""By which address hosts find rank 0, also where its own name means loopback there."""

from __future__ import annotations

import socket

import pytest

from lime_dist.errors import LayoutError
from lime_dist.lifecycle import network
from lime_dist.lifecycle.launcher import Place

PLACE = Place(rank=0, local_rank=0, world_size=3)
NAMES = {"localhost": "127.0.0.1", "n1": "127.0.1.1", "n2": "10.0.0.2", "far": "10.0.0.9", "127.0.0.1": "127.0.0.1"}
SLURM = {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURMD_NODENAME": "n1"}


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """On a host with two networks; a test adds the routes that it has: from an address to this host's own."""
    known: dict[str, str] = {}
    monkeypatch.setattr(network, "resolve", NAMES.get)
    monkeypatch.setattr(network, "source_address", lambda address: known.get(address or ""))
    monkeypatch.setattr(network, "_addresses", lambda: ["10.0.0.1", "10.9.0.1"])
    return known


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "far", "unknown"])
def test_a_name_that_misleads_nobody_is_kept(routes: dict[str, str], name: str) -> None:
    routes[network._ELSEWHERE] = "10.9.0.1"
    assert network.meeting_host(PLACE, {"MASTER_ADDR": name, **SLURM}) == name


def test_on_one_host_its_own_name_may_be_loopback(routes: dict[str, str]) -> None:
    routes[network._ELSEWHERE] = "10.9.0.1"
    assert network.meeting_host(PLACE, {"MASTER_ADDR": "n1", "LOCAL_WORLD_SIZE": "3"}) == "n1"


def test_of_several_networks_the_one_that_leads_to_the_other_hosts_counts(routes: dict[str, str]) -> None:
    routes |= {network._ELSEWHERE: "10.9.0.1", "10.0.0.2": "10.0.0.1"}
    assert network.meeting_host(PLACE, {"MASTER_ADDR": "n1", **SLURM}) == "10.0.0.1"
    assert network.meeting_host(PLACE, {"MASTER_ADDR": "n1", "LOCAL_WORLD_SIZE": "1"}) == "10.9.0.1"


def test_the_only_address_needs_no_route(routes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_addresses", lambda: ["10.0.0.1"])
    assert network.meeting_host(PLACE, {"MASTER_ADDR": "n1"}) == "10.0.0.1"


def test_where_no_address_is_likelier_the_host_is_named(routes: dict[str, str]) -> None:
    with pytest.raises(LayoutError, match="^environment: MASTER_ADDR=n1 is 127.0.1.1 on n1 itself.*set an address"):
        network.meeting_host(PLACE, {"MASTER_ADDR": "n1", **SLURM})
    assert network.meeting_host(PLACE, {"MASTER_ADDR": "n1"}) == "n1"  # no launcher says that there are other hosts


def test_it_listens_on_one_address() -> None:
    with network.listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        with pytest.raises(OSError, match="in use"):
            network.listen("127.0.0.1", listener.getsockname()[1])


@pytest.mark.parametrize("name", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_on_loopback_all_traffic_stays_there_unless_the_user_says_otherwise(name: str) -> None:
    environment = {"MASTER_ADDR": "127.0.0.1"}
    network.choose_interfaces(PLACE, environment)
    lo = network.find_interface("127.0.0.1")
    assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == (lo, f"={lo}")
    assert lo in dict(socket.if_nameindex()).values()
    own = {"MASTER_ADDR": "127.0.0.1", name: "eth7"}
    network.choose_interfaces(PLACE, own)
    assert own[name] == "eth7"
