"""The tree keeps its shape: our names shadow nothing, and every code folder is a package that says what it is."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = tuple(sorted(path.parent.name for path in ROOT.glob("*/__init__.py")))
PURE = ("cluster", "policies")


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_package_shadows_no_standard_library_module(package: str) -> None:
    assert package not in sys.stdlib_module_names


@pytest.mark.parametrize("package", PACKAGES)
def test_every_code_folder_says_what_lives_there(package: str) -> None:
    for folder in {path.parent for path in sources(package)}:
        marker = folder / "__init__.py"
        assert marker.exists(), f"{folder.relative_to(ROOT)} has code and no __init__.py"
        assert ast.get_docstring(ast.parse(marker.read_text())), f"{marker.relative_to(ROOT)} says nothing"


def test_every_package_is_installed_and_checked() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {pattern.rstrip("*") for pattern in config["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert found >= set(PACKAGES)
    assert set(config["tool"]["ruff"]["lint"]["isort"]["known-first-party"]) >= set(PACKAGES)


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def canonical(distribution: str) -> str:
    """As package indexes compare names; extras and bounds are left out."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", distribution)[0]).lower()


def test_every_third_party_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [names for extra, names in project["optional-dependencies"].items() if extra != "dev"]
    declared = {canonical(name) for names in (project["dependencies"], *extras) for name in names}
    providers = importlib.metadata.packages_distributions()
    ours = {*PACKAGES, *sys.stdlib_module_names}
    undeclared = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(*PACKAGES)
        for module in imported(path) - ours
        if not declared & {canonical(name) for name in providers.get(module, [module])}
    }
    assert not undeclared


@pytest.mark.parametrize("path", sources(*PURE), ids=lambda path: str(path.relative_to(ROOT)))
def test_pure_packages_use_neither_chance_nor_process_dependent_hash(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr == "random" and isinstance(node.value, ast.Name):
            assert node.value.id not in {"np", "numpy"}, f"{path}:{node.lineno} uses numpy.random"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "hash", f"{path}:{node.lineno} uses built-in hash, which differs between processes"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        assert not {"pickle", "cloudpickle", "dill"} & set(names), f"{path}:{node.lineno} imports {names}"
