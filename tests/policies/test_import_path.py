"""A policy named by its import path is what it says it is, or the config is refused with the place of the fault."""

from __future__ import annotations

import pytest

from cluster.errors import InvalidConfig
from policies.import_path import make_policy
from policies.policy import Router
from policies.routing import PredictedLatencyRouter

ROUTER = "policies.routing:PredictedLatencyRouter"


def test_a_policy_is_built_with_its_settings() -> None:
    made = make_policy(ROUTER, {"transfer_setup_s": 0.5}, place="routing", kind=Router)
    assert made == PredictedLatencyRouter(transfer_setup_s=0.5)


@pytest.mark.parametrize(
    "use", ["", ":", "policies.routing", "policies.routing:", "policies.routing:Absent", "no.such:Router", "..x:Y"]
)
def test_a_path_that_leads_nowhere_is_refused(use: str) -> None:
    with pytest.raises(InvalidConfig, match=r"scaling\.use '.*' cannot be imported as module:Class"):
        make_policy(use, {}, place="scaling", kind=Router)


@pytest.mark.parametrize("text", ["def (", "1 / 0", "import no.such"])
def test_a_module_that_cannot_be_imported_is_refused_whatever_it_raises(tmp_path, monkeypatch, text: str) -> None:
    (tmp_path / "broken_policy.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidConfig, match=r"scaling\.use 'broken_policy:Mine' cannot be imported as module:Class"):
        make_policy("broken_policy:Mine", {}, place="scaling", kind=Router)


def test_settings_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(InvalidConfig, match=f"routing.settings do not fit {ROUTER}: .*wieght"):
        make_policy(ROUTER, {"wieght": 1.0}, place="routing", kind=Router)


def test_what_follows_another_protocol_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"routing\.use 'os:getcwd' makes str, which is no policies\.policy\.Router"):
        make_policy("os:getcwd", {}, place="routing", kind=Router)
