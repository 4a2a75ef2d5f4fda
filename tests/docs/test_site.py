"""The site as it is built: strict, whole, and without anything from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/_site/hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "text", "relinked"),
    [
        ("gpu.md", "[a](models.md#x)", "[a](models.md#x)"),
        ("gpu.md", "[a](../README.md)", "[a](index.md)"),
        ("gpu.md", "[a](../CHANGELOG.md#new)", "[a](changelog.md#new)"),
        ("reference/errors.md", "[a](../../CHANGELOG.md)", "[a](../changelog.md)"),
        ("gpu.md", "[a](../benchmarks/README.md)", "[a](repository/benchmarks/README.md)"),
        ("gpu.md", "[`a` b](../Makefile)", "[`a` b](repository/Makefile.md)"),
        ("gpu.md", "![a](layers.png)", "![a](layers.png)"),
        ("gpu.md", "[a](https://example.org/x.md)", "[a](https://example.org/x.md)"),
        ("gpu.md", "[a](#here) [b](../nothing.md)", "[a](#here) [b](../nothing.md)"),
        ("gpu.md", "```sh\n[a](../README.md)\n```", "```sh\n[a](../README.md)\n```"),
    ],
)
def test_links_lead_into_the_site(hooks: ModuleType, page: str, text: str, relinked: str) -> None:
    docs = ROOT / "docs"
    assert hooks._relinked(text, docs / page, page, ROOT, docs) == relinked


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    # Not --quiet: it would silence the warnings before --strict can count them.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_everything_that_a_page_needs_is_in_the_site(site: Path) -> None:
    pages = [page for page in site.glob("**/*.html") if page.name != "404.html"]  # which is served from anywhere
    assert len(pages) > 25
    for page in pages:
        text = re.sub(r"<pre.*?</pre>", "", page.read_text(), flags=re.DOTALL)
        for tag, _, link in re.findall(
            r"<(script|link|img|source|iframe)\b[^>]*?\b(src|srcset|href)=\"([^\"]+)\"", text
        ):
            assert "://" not in link and not link.startswith("//"), f"{page.name}: {tag} from {link}"
            assert (page.parent / unquote(link)).exists(), f"{page.name}: {link} is not there"
        for link in re.findall(r"<a\b[^>]*?\bhref=\"([^\"]+)\"", text):
            path = unquote(link.partition("#")[0])
            if path and not re.match(r"[a-z]+:", path):
                assert (page.parent / path).exists(), f"{page.name}: {link} is not there"


@pytest.mark.slow
def test_public_names_are_in_the_reference(site: Path) -> None:
    import affect_edge

    text = (site / "reference/affect_edge.html").read_text()
    names = [name for name in affect_edge.__all__ if not name.startswith("__")]
    assert not [name for name in names if f'id="affect_edge.{name}"' not in text]


@pytest.mark.slow
def test_the_search_works_from_a_folder(site: Path) -> None:
    """What the page loads in place of the index over http, and the worker's stand-in."""
    assert (site / "search/search_index.js").read_text().startswith("var __index = ")
    assert 'src="assets/iframe-worker.js"' in (site / "index.html").read_text()
