"""Rules of the repository itself that no linter knows: sizes, sleeps, packaging, layers, words that must not be."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import itertools
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("agent", "cli", "common", "coordinator", "proto", "recommender", "simulator")
FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 600
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")
# Built from parts, so that this file does not find itself.
BANNED = {
    "../" + "shared": "the project reads nothing outside itself",
    "/" + "work" + "/main": "a path of one machine",
    "TO" + "DO": "do it, or write an issue",
    "FIX" + "ME": "do it, or write an issue",
    "NotImplemented" + "Error": "what is not there is not there",
    "pypi." + "org": "registries are the operator's choice",
    "--extra-" + "index-url": "registries are the operator's choice",
}
TEXT_SUFFIXES = frozenset({
    ".py", ".md", ".toml", ".proto", ".service", ".target", ".conf", ".txt", ".yaml", ".yml", ".c", ".sh", "",
})


def python_files(*folders: str) -> list[Path]:
    """The hand-written Python files below these folders."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if not GENERATED.search(path.name)]


def tracked_texts() -> Iterator[Path]:
    """The text files that git knows; in an unpacked sdist, which has no git, all that are there."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not any(part.startswith(".venv") for part in path.parts)]
    texts = (path for path in paths if path.is_file() and path.suffix in TEXT_SUFFIXES)
    yield from (path for path in texts if not GENERATED.search(path.name))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@dataclass(frozen=True, slots=True)
class Reading:
    """What the rules ask of one module, so that each is read and parsed once."""

    name: str
    lines: int
    has_docstring: bool
    long_functions: tuple[str, ...]
    guessed_sleeps: tuple[int, ...]


@functools.cache
def readings() -> tuple[Reading, ...]:
    """All hand-written modules of the project, tests included."""
    return tuple(reading(path) for path in python_files(*SOURCE_ROOTS, "tests"))


def reading(path: Path) -> Reading:
    text = path.read_text()
    lines = text.splitlines()
    tree = ast.parse(text)
    sleeps = tuple(number for number in guessed_sleeps(tree) if not is_explained(lines, number))
    return Reading(shown(path), len(lines), bool(ast.get_docstring(tree)), tuple(long_functions(tree)), sleeps)


def long_functions(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield f"{node.name} at {node.lineno}: {lines} lines"


def test_no_function_is_longer_than_a_screen() -> None:
    assert {one.name: one.long_functions for one in readings() if one.long_functions} == {}


def test_no_module_is_too_long_to_be_read() -> None:
    assert {one.name: one.lines for one in readings() if one.lines > MODULE_LINES_MAX} == {}


def test_every_module_says_what_it_is_for() -> None:
    assert [one.name for one in readings() if not one.has_docstring] == []


def guessed_sleeps(tree: ast.AST, *, polling: bool = False) -> Iterator[int]:
    """The lines of sleeps of a constant length outside of a `while`: inside of one it is the step of a poll."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="time" | "asyncio"), attr="sleep"),
                args=[ast.Constant(value=length)],
            ) if length != 0 and not polling:  # 0 only yields to the loop
                yield node.lineno
        yield from guessed_sleeps(node, polling=polling or isinstance(node, ast.While))


def is_explained(lines: list[str], number: int) -> bool:
    """Whether a comment stands beside or above the line."""
    return "#" in lines[number - 1] or lines[number - 2].lstrip().startswith("#")


def test_no_test_sleeps_for_a_guessed_time() -> None:
    """Tests wait for the world by enova_testing.waiting; benchmarks measure for a stated time.

    That something does not happen can only be seen by watching for a while: then a comment says so.
    """
    watched = [one for one in readings() if one.name.startswith("tests/") and "/benchmarks/" not in one.name]
    assert [f"{one.name}:{number}" for one in watched for number in one.guessed_sleeps] == []


def test_no_word_that_must_not_be() -> None:
    found = []
    for path in tracked_texts():
        text = path.read_text(errors="replace")
        found += [f"{shown(path)}: {word} ({why})" for word, why in BANNED.items() if word in text]
    assert found == []


def test_every_entry_point_can_be_imported() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts")
    points = [point for point in scripts if point.name.startswith("enova")]
    assert {point.name for point in points} == set(PROJECT["project"]["scripts"])
    for point in points:
        assert callable(point.load()), point.name


def test_every_package_says_that_it_is_typed() -> None:
    for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert (ROOT / package / "py.typed").exists(), package


def test_a_source_root_holds_one_package_and_nothing_else() -> None:
    """A Python file directly in proto/ would shadow another package of that name."""
    for folder in SOURCE_ROOTS:
        packages = [path.name for path in (ROOT / folder).iterdir() if path.is_dir() and path.name != "__pycache__"]
        assert len(packages) == 1, folder
        assert list((ROOT / folder).glob("*.py")) == []


def test_every_dependency_has_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    extras = PROJECT["project"]["optional-dependencies"].values()
    for requirement in itertools.chain(PROJECT["project"]["dependencies"], *extras):
        [line] = [line for line in text.splitlines() if line.strip().startswith(f'"{requirement}"')]
        assert re.search(r"# .*\w{3,}", line), requirement


def test_every_make_target_is_phony_and_explained() -> None:
    text = (ROOT / "Makefile").read_text()
    [phony] = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    targets = re.findall(r"^([a-z][a-z-]*):(?!=)(.*)$", text, re.MULTILINE)
    assert sorted(phony.split()) == sorted(name for name, _ in targets)
    assert [name for name, rest in targets if "## " not in rest] == []


def test_the_changelog_knows_the_version() -> None:
    version = re.escape(PROJECT["project"]["version"])
    assert re.search(rf"^## {version}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_every_allowed_skip_has_its_reason() -> None:
    lines = (ROOT / "tests" / "allowed_skips.txt").read_text().splitlines()
    entries = [line for line in lines if line.strip() and not line.startswith("#")]
    assert [line for line in entries if not re.fullmatch(r"\S+ +# \w.{10,}", line)] == []


def test_every_link_between_our_documents_leads_somewhere() -> None:
    broken = []
    for path in (path for path in tracked_texts() if path.suffix == ".md"):
        targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
        local = [target for target in targets if "://" not in target]
        broken += [f"{shown(path)}: {target}" for target in local if not (path.parent / target).exists()]
    assert broken == []


def test_the_contract_between_agent_and_ingress_names_every_module() -> None:
    package = ROOT / "agent" / "enova_agent"
    modules = {f"enova_agent.{path.stem}" for path in package.glob("*.py") if path.stem != "__init__"}
    contracts = {contract["name"]: contract for contract in PROJECT["tool"]["importlinter"]["contracts"]}
    away = contracts["The ingress shares only the core with the rest of the agent"]["forbidden_modules"]
    back = contracts["The agent shares only the core with the ingress"]["source_modules"]
    assert set(away) == modules, "pyproject.toml, [tool.importlinter]"
    assert set(back) == modules, "pyproject.toml, [tool.importlinter]"


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("agent/enova_agent/core/planted.py", "import time", "Cores are pure"),
        ("coordinator/enova_coordinator/core/planted.py", "from enova.v1 import cluster_pb2", "Only edge modules"),
        ("recommender/enova_recommender/planted.py", "from enova_common import logs", "Programs sit on libraries"),
        ("agent/enova_agent/ingress/planted.py", "from enova_agent import supervisor", "The ingress shares only"),
        ("cli/enova_cli/planted.py", "from enova_coordinator.core import model", "Programs do not know each other"),
    ],
)
def test_a_planted_violation_breaks_its_contract(tmp_path: Path, module: str, line: str, contract: str) -> None:
    for folder in SOURCE_ROOTS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / module).write_text(f'"""Planted."""\n\n{line}\n')
    path = ":".join(str(tmp_path / folder) for folder in SOURCE_ROOTS)
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=tmp_path,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "COLUMNS": "200"},
        capture_output=True, text=True, check=False, timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    broken = re.findall(r"^.* BROKEN(?: \(\d+ ignored imports\))?$", done.stdout, re.MULTILINE)
    assert any(re.match(contract, text) for text in broken), done.stdout


@pytest.mark.slow
@pytest.mark.network
def test_wheel_and_sdist_hold_what_they_must_and_nothing_else(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True, timeout=170)
    [wheel], [sdist] = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packages = {Path(package).name for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    version = PROJECT["project"]["version"]
    assert {name.split("/")[0] for name in names} == packages | {f"enova-{version}.dist-info"}
    for root in SOURCE_ROOTS:
        for path in (ROOT / root).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                assert str(path.relative_to(ROOT / root)) in names, path
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"README.md", "LICENSE", "Makefile", "proto/enova/v1/cluster.proto", "tests/conftest.py"}
    assert wanted | {"deploy/etc/agent.toml"} <= inside
    assert [name for name in inside if name.startswith((".venv", ".git/"))] == []
