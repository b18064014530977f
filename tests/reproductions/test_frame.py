"""The frame of reproductions: found without a list, judged by their bounds, honest about what they lack."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from cluster.errors import InvalidConfig
from reproductions import walk
from reproductions.row import Row
from reproductions.settings import Settings, found_data

ROW = Row(
    system="Rocket",
    claim="2x as fast (abstract)",
    setting="one machine",
    published="2",
    ours=1.9,
    unit="x",
    label="predicted",
    depends_on_prefill=False,
    low=1.8,
    high=2.2,
    tolerance="10 %",
)


def package_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> ModuleType:
    import importlib

    (folder / f"p{id(folder)}").mkdir()
    (folder / f"p{id(folder)}" / "__init__.py").write_text("")
    for name, text in modules.items():
        (folder / f"p{id(folder)}" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module(f"p{id(folder)}")


def test_a_module_with_rows_is_a_reproduction_and_no_other_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = package_of(tmp_path, monkeypatch, zeppelin="def rows(settings): ...", row="x = 1", apollo="def rows(settings): ...")
    assert list(walk.found(package)) == ["apollo", "zeppelin"]
    assert list(walk.named(["Zeppelin"], package)) == ["zeppelin"]


def test_a_name_that_is_none_s_is_refused_with_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = package_of(tmp_path, monkeypatch, apollo="def rows(settings): ...")
    with pytest.raises(InvalidConfig, match="'gemini'; there are apollo"):
        walk.named(["gemini"], package)


@pytest.mark.parametrize(("ours", "verdict"), [(1.8, "within"), (2.2, "within"), (1.79, "outside"), (2.21, "outside")])
def test_verdict_follows_from_the_bounds(ours: float, verdict: str) -> None:
    assert msgspec.structs.replace(ROW, ours=ours).verdict == verdict


def test_what_cannot_be_reproduced_says_why() -> None:
    with pytest.raises(ValueError, match="no reason"):
        msgspec.structs.replace(ROW, ours=None)
    assert msgspec.structs.replace(ROW, ours=None, why="needs its machine").verdict == "not reproducible"


def test_rows_are_stamped_with_their_seconds_and_whether_they_were_cut_short(tmp_path: Path) -> None:
    module = ModuleType("rocket")
    module.rows = lambda settings: iter((ROW, ROW))
    [first, second] = walk.reproduced(module, Settings(data_dir=tmp_path, quick=True))
    assert first.quick
    assert second.quick
    assert first.seconds > 0.0


def test_data_that_is_absent_is_named_with_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBULA_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InvalidConfig, match="nowhere: set MOBULA_DATA"):
        found_data()


@pytest.mark.parametrize("cost", [0.0, -1.0, float("inf"), float("nan")])
def test_prefill_cost_that_is_no_factor_is_refused(cost: float, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="prefill cost"):
        Settings(data_dir=tmp_path, prefill_cost=cost)
