"""Claims about pipelines as a config names them."""

import msgspec
import pytest

from cluster.errors import InvalidConfig
from cluster.fleet import PipelineSpec, PolicySpec
from controller.pipelines import as_text, build, from_text, spelled_out

SOURCE = """
from __future__ import annotations
import msgspec

class Mine(msgspec.Struct, frozen=True, kw_only=True):
    emergency: bool = False
    levels: tuple[float, ...] = (1.0, 2.0)

    def decide(self, snapshot, accepted):
        return ()

class Undecided(msgspec.Struct, frozen=True):
    def decide(self, snapshot, accepted):
        return ()

class Odd(msgspec.Struct, frozen=True):
    emergency: bool = False
    unknown: NotImported = None

    def decide(self, snapshot, accepted):
        return ()
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "operators_policy.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)


def spec(name: str, **settings: object) -> PipelineSpec:
    return PipelineSpec(policies=(PolicySpec(use=f"operators_policy:{name}", settings=settings),), guards=())


def test_a_policy_of_the_operators_own_is_built_with_its_settings():
    (policy,) = build(spec("Mine", levels=[3.0])).policies
    assert policy.levels == (3.0,)


def test_what_is_spelled_out_is_as_a_file_has_it():
    (policy,) = spelled_out(spec("Mine")).policies
    assert policy.settings == {"emergency": False, "levels": [1.0, 2.0]}


def test_the_text_stands_for_the_pipeline():
    assert from_text(as_text(PipelineSpec())) == build(PipelineSpec())


def test_a_policy_must_say_whether_it_is_for_emergencies():
    with pytest.raises(InvalidConfig, match=r"control\.pipeline\.policies\[0\]\.use .* needs a field `emergency: bool`"):
        build(spec("Undecided"))


def test_fields_that_nobody_can_set_are_refused():
    with pytest.raises(InvalidConfig, match=r"policies\[0\]\.settings: fields of Odd cannot be set by a config: .*NotImported"):
        build(spec("Odd"))


def test_an_unknown_setting_is_refused_though_the_class_would_ignore_it():
    with pytest.raises(InvalidConfig, match=r"unknown key `x\.policies\[0\]\.settings\.level`; did you mean levels"):
        build(spec("Mine", level=[1.0]), "x")


def test_a_text_of_another_release_is_refused():
    text = msgspec.json.encode({"plans": []}).decode()
    with pytest.raises(InvalidConfig, match="its pipeline is of another release"):
        from_text(text)
