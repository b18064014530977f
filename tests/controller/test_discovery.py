"""Prometheus is told whom to scrape."""

import json
import socket

import aiohttp
import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet, ModelSpec, NodeSpec, ReplicaGroup, TransportSpec
from cluster.replica import Role
from controller.observe.discovery import DiscoveryServer, TargetGroup, target_groups
from tests.controller.test_assemble import member

FLEET = Fleet(
    name="f",
    models=(ModelSpec(name="m", path="m"),),
    nodes=(NodeSpec(name="a", pool="p", accelerator="h100"),),
    replicas=(ReplicaGroup(role=Role.MIXED),),
)


def worker(name: str, endpoint: str, node: str = "a"):
    return msgspec.structs.replace(member(name, node=node), metrics_endpoint=endpoint)


def test_workers_are_known_by_their_machine_and_scraped_once():
    replicas = [worker("r0", "127.0.0.1:7"), worker("r1", "127.0.0.1:7"), worker("r2", "127.0.0.1:5", node="stranger")]
    labels = {"fleet": "f", "component": "worker"}
    assert target_groups(FLEET, replicas, ()) == (
        TargetGroup(targets=("127.0.0.1:5",), labels={**labels, "node": "stranger"}),
        TargetGroup(targets=("127.0.0.1:7",), labels={**labels, "node": "a", "pool": "p", "accelerator": "h100"}),
    )


def test_gateways_are_scraped_as_they_serve():
    labels = {"fleet": "f", "component": "gateway", "__scheme__": "http"}
    assert target_groups(FLEET, (), ("b:2", "a:1", "[::1]:3")) == (TargetGroup(targets=("[::1]:3", "a:1", "b:2"), labels=labels),)
    under_tls = msgspec.structs.replace(FLEET, transport=TransportSpec(tls_dir="tls"))
    assert target_groups(under_tls, (), ("a:1",))[0].labels["__scheme__"] == "https"


@pytest.mark.parametrize("endpoint", ["", "nowhere", "a:b", "http://a:1/", "a:1\nb:2", "u:p@a:1", "a:1000000"])
def test_what_is_no_address_is_no_target(endpoint):
    assert target_groups(FLEET, [worker("r0", endpoint)], [endpoint]) == ()


async def test_server_tells_targets_its_own_metrics_and_what_is_here():
    registry = CollectorRegistry()
    Counter("mobula_x_total", "X.", registry=registry).inc()
    server = DiscoveryServer("f", lambda: target_groups(FLEET, (), ("a:1",)), registry)
    await server.start()
    try:
        async with aiohttp.ClientSession(f"http://{server.address}") as session:
            async with session.get("/targets") as response:
                assert response.content_type == "application/json"
                assert json.loads(await response.read()) == [
                    {"targets": ["a:1"], "labels": {"fleet": "f", "component": "gateway", "__scheme__": "http"}},
                    {"targets": [server.address], "labels": {"fleet": "f", "component": "controller"}},
                ]
            async with session.get("/metrics") as response:
                assert response.content_type == "text/plain"
                assert "mobula_x_total 1.0" in await response.text()
            async with session.get("/") as response:
                assert "/targets" in await response.text()
            async with session.post("/targets") as response:
                assert response.status == 405
    finally:
        await server.close()


async def test_taken_port_is_refused_by_name():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = DiscoveryServer("f", tuple, CollectorRegistry())
        with pytest.raises(InvalidConfig, match=f"control.http_port {port} on 127.0.0.1: .*in use"):
            await server.start(port=port)
        await server.close()
