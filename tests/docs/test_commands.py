"""Every command and every piece of Python in the documentation runs, or says why not.

A page's fenced blocks (sh, bash, console, python) run in order in one folder, with the environment of these tests;
Python blocks of a page share their names. What a page may say of a block, in HTML comments right above its fence:

    <!-- not run: REASON -->        a reason is needed
    <!-- run elsewhere: WHERE -->   make targets and files of tests, which must exist
    <!-- slow -->                   under the marker slow
    <!-- setup: ... -->             Python that runs first and that a reader need not see
    <!-- output -->                 above a text block: lines that the block before it prints, in this order;
                                    `...` is any text

A Python block with a title, as in ```python title="name.py", is written to that file instead of being run. `drive.mp4`
is there: the clip that a page's reader brings along.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Pages that run something: the pages of the site, and what a visitor of the repository sees first.
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])
SHELLS = ("sh", "bash", "console")
RUN = (*SHELLS, "python")
_FENCE = re.compile(r"^(```+)(\w*)(?: title=\"([^\"]+)\")?.*$")
_COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
_LIMIT_S = 240
_DRIVER = """
import json, pathlib, subprocess, sys
for block in json.loads(pathlib.Path(sys.argv.pop()).read_text()):
    print(block["mark"], flush=True)
    if block["file"]:
        pathlib.Path(block["file"]).write_text(block["code"])
    elif block["python"]:
        sys.path[:0] = [""] * ("" not in sys.path)
        exec(compile(block["code"], block["where"], "exec"), globals())
        sys.stdout.flush()
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", block["code"]], check=True)
"""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page.

    Attributes:
        language: of the fence.
        code: what it holds, prompts and printed lines of a console taken away.
        line: where it begins.
        file: that it is to be written to.
        skipped: why it is not run, or where else; None where it is run here.
        elsewhere: whether `skipped` says where.
        slow: whether it is for the marker slow.
        setup: Python that runs before it.
        output: lines that it is said to print.
    """

    language: str
    code: str
    line: int
    file: str = ""
    skipped: str | None = None
    elsewhere: bool = False
    slow: bool = False
    setup: str = ""
    output: tuple[str, ...] = ()


def read_blocks(text: str) -> list[Block]:
    """The blocks of a page in order.

    Raises:
        ValueError: a comment or block that this file's docstring does not know.
    """
    blocks: list[Block] = []
    lines, above, at = text.split("\n"), "", 0
    while at < len(lines):
        line, found = lines[at], _FENCE.match(lines[at])
        if found is not None:
            end = next(i for i in range(at + 1, len(lines)) if lines[i].startswith(found[1]))
            block = _block(found[2], "\n".join(lines[at + 1 : end]), at + 1, found[3] or "", above)
            if "<!-- output -->" in above:
                if not blocks or block.language != "text":
                    raise ValueError(f"line {at + 1}: an output is a text block after the block that prints it")
                blocks[-1] = replace(blocks[-1], output=tuple(filter(None, block.code.split("\n"))))
            elif block.language in RUN:
                blocks.append(block)
            above, at = "", end + 1
            continue
        if line.startswith("<!--") or ("<!--" in above and "-->" not in above):
            above += line + "\n"  # until it is closed, whatever it holds
        elif above or not line.startswith("    ") or (at and lines[at - 1].strip()):
            above = ""
        else:
            raise ValueError(f"line {at + 1}: indented code; give it a fence, so that it is run")
        at += 1
    return blocks


def _block(language: str, code: str, line: int, file: str, above: str) -> Block:
    said: dict[str, str] = {}
    for comment in _COMMENT.findall(above):
        key, colon, value = comment.strip().partition(":")
        said[key.strip()] = value.strip()
        if key.strip() in ("not run", "run elsewhere", "setup") and not (colon and value.strip()):
            raise ValueError(f"line {line}: <!--{comment}--> says no more; a reason, a place or code is needed")
    if unknown := set(said) - {"not run", "run elsewhere", "slow", "setup", "output"}:
        raise ValueError(f"line {line}: unknown comment {sorted(unknown)}")
    if not language:
        raise ValueError(f"line {line}: a fence without a language; text is for what is not to be run")
    output: tuple[str, ...] = ()
    if language == "console":
        rows = code.split("\n")
        output = tuple(row for row in rows if row and not row.startswith("$ "))
        code = "\n".join(row[2:] for row in rows if row.startswith("$ "))
    skipped = said.get("not run", said.get("run elsewhere"))
    return Block(
        language, code, line, file, skipped, "run elsewhere" in said, "slow" in said, said.get("setup", ""), output
    )


def missing_lines(wanted: tuple[str, ...], printed: str) -> list[str]:
    """The first of the wanted lines that is not there, in their order; `...` stands for any text."""
    rest = printed.split("\n")
    for line in wanted:
        if line.strip() == "...":
            continue
        pattern = re.compile(".*".join(map(re.escape, line.strip().split("..."))))
        at = next((i for i, row in enumerate(rest) if pattern.fullmatch(row.strip())), None)
        if at is None:
            return [line]
        rest = rest[at + 1 :]
    return []


def run_page(page: str, folder: Path, slow: bool) -> None:
    """Runs a page's blocks in a folder."""
    from affect_demos.dashcam import demo_clip

    blocks = [b for b in read_blocks((ROOT / page).read_text()) if b.skipped is None and (slow or not b.slow)]
    if not blocks:
        return
    shutil.copy(demo_clip(), folder / "drive.mp4")
    plan = [
        {
            "mark": f"<<block {i}>>",
            "where": f"{page}, line {b.line}",
            "file": b.file,
            "python": b.language == "python",
            "code": b.setup + "\n" * bool(b.setup) + b.code,
        }
        for i, b in enumerate(blocks)
    ]
    (folder / ".plan.json").write_text(json.dumps(plan))
    paths = [str(Path(p).resolve()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(paths),
        # Nobody's own files, no terminal's width, no screen.
        "HOME": str(folder / ".home"),
        "XDG_CACHE_HOME": str(folder / ".home"),
        "AFFECT_EDGE_CACHE": str(folder / ".cache"),
        "MPLBACKEND": "Agg",
        "COLUMNS": "120",
        # Of models this small a second thread costs more than it brings.
        "OMP_NUM_THREADS": "1",
    }
    (folder / ".home").mkdir()
    command = [sys.executable, "-c", _DRIVER, ".plan.json"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    parts = re.split(r"^<<block \d+>>\n", done.stdout, flags=re.MULTILINE)[1:]
    last = blocks[max(0, len(parts) - 1)]
    assert done.returncode == 0, (
        f"{page}, line {last.line}:\n{parts[-1][-2000:] if parts else ''}\n{done.stderr[-3000:]}"
    )
    for block, printed in zip(blocks, parts, strict=True):
        missing = missing_lines(block.output, printed)
        assert not missing, f"{page}, line {block.line}: did not print {missing[0]!r}, but:\n{printed[-2000:]}"


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs(page: str, tmp_path: Path) -> None:
    run_page(page, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if "<!-- slow -->" in (ROOT / p).read_text()] or ["docs/index.md"])
def test_what_takes_longer_runs_too(page: str, tmp_path: Path) -> None:
    run_page(page, tmp_path, slow=True)


@cache
def _help(command: str) -> str:
    """What a command says of itself; in this process, which has imported what the commands would."""
    found = importlib.metadata.entry_points(group="console_scripts", name=command)
    assert found, f"there is no command {command}"
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        patch.setattr(sys, "argv", [command, "--help"])
        next(iter(found)).load()()
    return said.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_is_at_least_there(page: str) -> None:
    """Options of our commands exist; files and make targets that a page sends its readers to exist, too."""
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {name for line in targets for name in line.split()}
    for block in read_blocks((ROOT / page).read_text()):
        if block.elsewhere:
            for place in (block.skipped or "").split(","):
                make, _, target = place.strip().partition("make ")
                known = target in targets if not make else (ROOT / place.strip()).exists()
                assert known, f"{page}, line {block.line}: said to be run by {place.strip()!r}, which is not there"
        if block.language == "python":
            continue
        for line in block.code.replace("\\\n", " ").split("\n"):
            words = shlex.split(line, comments=True)
            if words and words[0] == "python" and words[1:] and words[1].startswith(("benchmarks/", "docs/")):
                assert (ROOT / words[1]).is_file(), f"{page}, line {block.line}: there is no {words[1]}"
            if words and words[0] == "make":
                asked = [w for w in words[1:] if "=" not in w and not w.startswith("-")]
                assert set(asked) <= targets, f"{page}, line {block.line}: make has no {set(asked) - targets}"
            if words and words[0].startswith("affect-"):
                options = {w.split("=")[0] for w in words if w.startswith("--")}
                known_options = set(re.findall(r"--[\w-]+", _help(words[0])))
                assert options <= known_options, (
                    f"{page}, line {block.line}: {words[0]} has no {options - known_options}"
                )


# The reader of pages itself.


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("<!-- not run: -->\n```sh\nls\n```", "a reason"),
        ("<!-- run elsewhere -->\n```sh\nls\n```", "a reason"),
        ("<!-- skip -->\n```sh\nls\n```", "unknown comment"),
        ("```\nls\n```", "without a language"),
        ("text\n\n    ls\n", "indented code"),
        ("<!-- output -->\n```text\na\n```", "an output"),
    ],
)
def test_a_block_that_nobody_could_judge_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        read_blocks(text)


def test_blocks_are_read_with_what_is_said_of_them() -> None:
    text = (
        "<!-- slow -->\n```sh\na\nb\n```\n\n<!-- output -->\n```text\nc ... d\n```\n```console\n$ e\nf\n```\n"
        '<!-- setup:\nx = 1\n-->\n```python\ny\n```\n```python title="z.py"\nz\n```\n'
        "<!-- not run: no GPU -->\n```sh\nq\n```\n"
    )
    first, console, python, file, skipped = read_blocks(text)
    assert (first.code, first.slow, first.output) == ("a\nb", True, ("c ... d",))
    assert (console.code, console.output) == ("e", ("f",))
    assert (python.setup.strip(), python.code) == ("x = 1", "y")
    assert (file.file, file.skipped) == ("z.py", None)
    assert (skipped.skipped, skipped.elsewhere) == ("no GPU", False)


def test_said_output_is_looked_for_in_order() -> None:
    assert not missing_lines(("a", "...", "c ... e"), "x\na\nb\nc d e\n")
    assert missing_lines(("c", "a"), "a\nc") == ["a"]


@pytest.mark.parametrize("block", ["```python\nraise ValueError\n```", "```sh\nfalse | true\n```"])
def test_a_block_that_fails_fails(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.md").write_text(block)
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"page\.md, line 1"):
        run_page("page.md", tmp_path / "run", slow=False)
