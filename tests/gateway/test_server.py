"""Claims about the gateway's own socket: under TLS nothing travels in clear, and no certificate is asked of a client."""

import httpx
import pytest

from cluster.errors import InvalidConfig
from tests.certificates import write_certificates
from tests.gateway.fake_fleet import MODEL, FakeFleet


async def test_under_tls_it_answers_https_with_its_certificate_and_nothing_in_clear(serve, tmp_path):
    write_certificates(tmp_path)
    async with serve(FakeFleet("a"), tls_dir=tmp_path) as served:
        body = {"model": MODEL, "prompt": "a b c", "max_tokens": 4}
        assert (await served.http.post("/v1/completions", json=body)).json()["usage"]["completion_tokens"] == 4
        async with httpx.AsyncClient() as stranger:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await stranger.get(f"{served.url}/health")
            with pytest.raises(httpx.TransportError):
                await stranger.get(f"{served.url}/health".replace("https", "http"))


async def test_a_certificate_that_does_not_load_is_named_before_it_listens(serve, tmp_path):
    with pytest.raises(InvalidConfig, match=f"transport.tls_dir {tmp_path}: cert.pem and key.pem do not load: No such file"):
        async with serve(FakeFleet("a"), tls_dir=tmp_path):
            pass
