from __future__ import annotations

import pytest

from transports.choose import for_pull
from transports.grpc import GrpcTransport
from transports.shared_memory import SharedMemoryTransport
from transports.transport import Credential

MEMORY, NETWORK = (kind(Credential(secret="sesame")) for kind in (SharedMemoryTransport, GrpcTransport))


@pytest.mark.parametrize(
    ("here", "there", "chosen"), [("a", "a", MEMORY), ("a", "b", NETWORK), ("", "", NETWORK), ("a", "", NETWORK)]
)
def test_memory_is_shared_only_on_a_host_known_to_be_the_same(here, there, chosen):
    assert for_pull(here, there, same_host=MEMORY, network=NETWORK) is chosen
