"""Pages that say what is there: links, the menu, the manifest's fields, public names, messages."""

import ast
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import affect_edge
from affect_runtimes import filters
from affect_runtimes.interface import LogMel

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
LINKED = sorted([*PAGES, *ROOT.glob("*.md"), ROOT / "benchmarks/README.md", *ROOT.glob("export/**/MODEL_CARD.md")])
BUNDLES = sorted((ROOT / "sdk/affect_edge/bundles").glob("*/manifest.json"))


def _hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "_site/hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _config() -> dict[str, Any]:
    yaml: Any = importlib.import_module("yaml")  # without types
    found: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    return found


def _anchors(text: str) -> set[str]:
    """What headings are called in links, as both GitHub and MkDocs do for plain ones."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M):
        words = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).strip()
        found.add(re.sub(r"[\s]+", "-", words))
    return found


@pytest.mark.parametrize("page", LINKED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Also those to files outside docs/, which MkDocs does not see, and in files that are no page."""
    hooks, text = _hooks(), page.read_text()
    links = [match[2] for match in hooks.LINK.finditer(hooks.prose(text, lambda part: part)) if ":" not in match[2]]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} is not there"
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target.read_text()), f"{link}: there is no such heading"
    for path in re.findall(r"^<!-- include: (\S+) -->$", text, re.M):
        assert (page.parent / path).is_file(), f"{path} is not there"


def _in_menu(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from _in_menu(inner)


def test_the_menu_has_every_page_once_and_no_other() -> None:
    listed = list(_in_menu(_config()["nav"]))
    assert sorted(listed) == sorted(p.relative_to(DOCS).as_posix() for p in PAGES)


def test_nothing_is_fetched_by_a_reader() -> None:
    config = _config()
    assert config["theme"]["font"] is False
    assert "repo_url" not in config  # the theme would ask the host of the repository for stars
    named = [*config["extra_css"], *config["extra"]["polyfills"], *config.get("extra_javascript", [])]
    assert not [name for name in named if not (DOCS / name).is_file()]
    assert not [p for p in PAGES if "```mermaid" in p.read_text()]  # comes from elsewhere when it is used
    for asset in (DOCS / "assets").iterdir():
        outside = re.findall(r"https?://(?!www\.w3\.org/)\S+", asset.read_text())
        assert not outside, f"{asset.name} names {outside}"


# The bundle format.

READERS = {
    "choice",
    "flag",
    "given",
    "number",
    "numbers",
    "object",
    "objects",
    "refuse",
    "text",
    "texts",
    "whole",
    "get",
}


def _fields_of_the_parser() -> set[str]:
    """Every field that is asked for by name in the modules that read a manifest."""
    found = {"name"}  # `Fields.name()` without an argument
    for module in ("manifest", "interface"):
        tree = ast.parse((ROOT / f"runtimes/affect_runtimes/{module}.py").read_text())
        for node in ast.walk(tree):
            literals: list[ast.expr] = []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READERS:
                literals = node.args[:1]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_digest":
                literals = node.args[1:2]
            elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
                literals = [node.left]
            elif isinstance(node, ast.Subscript):
                literals = [node.slice]
            found |= {n.value for n in literals if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return {name for name in found if name.isidentifier()}


def _described() -> set[str]:
    """The names in the first columns of the page's tables, and in what it says of what all have."""
    text = (DOCS / "bundle.md").read_text()
    named = set()
    for row in re.findall(r"^\| (.+?) \|", text, re.M):
        named |= set(re.findall(r"`(\w+)`", row))
    for settings in re.findall(r"^\| `\w+` \| ((?:`\w+`(?:, )?)+) \|$", text, re.M):  # of the filters
        named |= set(re.findall(r"`(\w+)`", settings))
    for sentence in re.findall(r"^(?:Each|A figure) has .+$", text, re.M):
        named |= set(re.findall(r"`(\w+)`", sentence))
    return named


def test_the_parser_is_read_at_all() -> None:
    """The walk over the source finds fields of every kind of reader."""
    assert {"schema", "weights_sha256", "frame_interval_s", "native", "plans", "growth", "rate_hz", "kept_by"} <= (
        _fields_of_the_parser()
    )


def test_every_field_that_the_parser_knows_is_on_the_page() -> None:
    settings = {name for of in filters._SETTINGS.values() for name in of}
    known = _fields_of_the_parser() | set(LogMel.__dataclass_fields__) | set(filters._SETTINGS) | settings
    # Not fields, but what the parser compares with: the graphs' own tensor, and kinds of input and output.
    known -= {"batch"}
    assert not known - _described()


FREE = ("config", "precision", "made_with", "files", "ran_on")
"""Objects whose keys are names that an export fills in."""


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for inner in value:
            yield from _keys(inner)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key not in FREE:
                yield from _keys(inner)


@pytest.mark.parametrize("path", BUNDLES, ids=lambda p: p.parent.name)
def test_every_field_that_an_export_writes_is_on_the_page(path: Path) -> None:
    assert not set(_keys(json.loads(path.read_text()))) - _described()


# Names and words.


def test_the_reference_has_every_public_name() -> None:
    """The page is made from `__all__`, so this holds what it is made from: a docstring each."""
    public = [getattr(affect_edge, name) for name in affect_edge.__all__ if not name.startswith("__")]
    assert not [p for p in public if callable(p) and not p.__doc__]


def test_messages_in_the_troubleshooting_are_those_that_are_said() -> None:
    rows = re.findall(r"^\| (`.+?) \|", (DOCS / "troubleshooting.md").read_text(), re.M)
    quoted = [words for row in rows for words in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 20
    sources = [p for room in ("sdk", "runtimes", "quantize", "export") for p in (ROOT / room).glob("**/*.py")]
    said = "\n".join(p.read_text() for p in [*sources, ROOT / "Makefile"])
    assert not [words for words in quoted if words not in said]
