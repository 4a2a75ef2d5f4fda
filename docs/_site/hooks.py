"""What MkDocs does not do by itself: links to files of the repository outside docs/, and pages that are such files.

A page may link to any file of the repository by its path, as it must for readers of the repository itself. Here such a
link leads to a copy of that file in the site: Markdown as a page, anything else as a page with its text. A line
`<!-- include: ../FILE.md -->` becomes that file.
"""

import logging
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

_log = logging.getLogger("mkdocs.hooks")
FOLDER = "repository"
"""Of the site, where copies of the repository's files are."""
OWN_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
"""Files of the repository that have a page of their own."""
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\()([^()\s]+)(\))")
_INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
_FENCE = re.compile(r"^(```|~~~)", re.MULTILINE)
_LANGUAGES = {".py": "python", ".h": "c", ".c": "c", ".json": "json", ".sh": "sh", ".yml": "yaml", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds every file of the repository that a page links to, and those that these link to."""
    root, docs = _root(config), Path(config.docs_dir)
    waiting = [Path(f.abs_src_path) for f in files.documentation_pages() if f.abs_src_path]
    waiting += [root / name for name in OWN_PAGES if (root / name).is_file()]
    known: set[Path] = set(waiting)
    while waiting:
        page = waiting.pop()
        for target in linked(page.read_text(), page):
            if target in known or target.is_relative_to(docs) or not target.is_relative_to(root):
                continue
            known.add(target)
            name = target.relative_to(root).as_posix()
            if name in OWN_PAGES or not target.is_file():
                continue
            files.append(_copy(target, name, config))
            if target.suffix == ".md":
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts included files in, and turns links to the repository's files into links to their copies."""
    root = _root(config)
    uri = page.file.src_uri
    source = root / uri.removeprefix(f"{FOLDER}/") if uri.startswith(f"{FOLDER}/") else Path(config.docs_dir) / uri
    docs = Path(config.docs_dir)

    def included(found: re.Match[str]) -> str:
        file = (source.parent / found[1]).resolve()
        if not file.is_file():
            _log.warning("%s includes %s, and there is no such file", uri, found[1])
            return ""
        text = file.read_text()
        if markdown.lstrip().startswith("# "):  # the page has a heading of its own
            text = re.sub(r"\A# .*\n+", "", text)
        return _relinked(text, file, uri, root, docs)

    return _INCLUDE.sub(included, _relinked(markdown, source, uri, root, docs))


def linked(text: str, page: Path) -> Iterator[Path]:
    """The files that a Markdown text links to, whether they are there or not."""
    for target, _ in _targets(text):
        yield (page.parent / target).resolve()


def prose(text: str, change: Callable[[str], str]) -> str:
    """A Markdown text with everything but its fenced code changed."""
    parts = _FENCE.split(text)
    # Text, fence, code, fence, text, fence, ...
    inside, made = False, []
    for part in parts:
        if part in ("```", "~~~"):
            inside = not inside
            made.append(part)
        else:
            made.append(part if inside else change(part))
    return "".join(made)


def _targets(text: str) -> Iterator[tuple[str, str]]:
    found: list[tuple[str, str]] = []

    def note(part: str) -> str:
        found.extend(_split(match[2]) for match in LINK.finditer(part) if _is_path(match[2]))
        return part

    prose(text, note)
    yield from found


def _relinked(text: str, source: Path, uri: str, root: Path, docs: Path) -> str:
    def one(found: re.Match[str]) -> str:
        if not _is_path(found[2]):
            return found[0]
        target, anchor = _split(found[2])
        file = (source.parent / target).resolve()
        if not file.is_file() or not file.is_relative_to(root):
            return found[0]  # MkDocs says what is wrong with it
        name = file.relative_to(root).as_posix()
        if file.is_relative_to(docs):
            place = file.relative_to(docs).as_posix()
        else:
            place = OWN_PAGES.get(name, f"{FOLDER}/{name}" + ("" if file.suffix in (".md", ".png", ".jpg") else ".md"))
        return f"{found[1]}{posixpath.relpath(place, posixpath.dirname(uri) or '.')}{anchor}{found[3]}"

    return prose(text, lambda part: LINK.sub(one, part))


def _copy(file: Path, name: str, config: MkDocsConfig) -> File:
    place = f"{FOLDER}/{name}"
    # In no menu, and that is meant.
    level = InclusionLevel.NOT_IN_NAV
    if file.suffix in (".md", ".png", ".jpg"):
        return File.generated(config, place, abs_src_path=str(file), inclusion=level)
    fence = "`" * 5
    text = f"# {file.name}\n\n`{name}`\n\n{fence}{_LANGUAGES.get(file.suffix, 'text')}\n{file.read_text()}{fence}\n"
    return File.generated(config, f"{place}.md", content=text, inclusion=level)


def _is_path(target: str) -> bool:
    return not re.match(r"[a-z][a-z0-9+.-]*:|#|/", target)


def _split(target: str) -> tuple[str, str]:
    path, mark, anchor = target.partition("#")
    return path, mark + anchor


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent
