"""An output folder that appears whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["MADE_BY", "SUMMARY", "OutputRefused", "check_output", "whole_folder"]

MADE_BY = "affect-dashcam"
SUMMARY = "summary.json"
_FILES = {SUMMARY, "annotated.mp4", "timeline.csv", "timeline.png"}


class OutputRefused(Exception):
    """The output path holds something that this program did not write."""


def check_output(folder: Path) -> None:
    """Refuses a path that writing would take something from.

    Free are: nothing there, an empty folder, or a folder that holds an earlier run's files and no others.

    Raises:
        OutputRefused: anything else; the message says what was found.
    """
    advice = "nothing was changed; choose another --output"
    if not folder.exists():
        if folder.is_symlink():
            raise OutputRefused(f"{folder}: a link to nothing; {advice}")
        return
    if not folder.is_dir():
        raise OutputRefused(f"{folder}: is a file, and the output is a folder; {advice}")
    found = {path.name for path in folder.iterdir()}
    if not found:
        return
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        ours = isinstance(summary, dict) and summary.get("made_by") == MADE_BY
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise OutputRefused(f"{folder}: exists and was not written by {MADE_BY}; {advice}")
    if found - _FILES:
        raise OutputRefused(f"{folder}: also holds {', '.join(sorted(found - _FILES)[:3])}; {advice}")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`, which takes its place when the block ends well.

    Any error, Ctrl-C included, removes the temporary folder and leaves an earlier result as it was.

    Args:
        folder: where the result shall be; `check_output` says whether it may.

    Yields:
        The folder to write into.

    Raises:
        OutputRefused: see `check_output`; also when somebody else wrote there meanwhile.
    """
    folder = folder.resolve()  # through a link, the folder behind it is replaced and the link stays
    check_output(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because only a rename within one file system is atomic.
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    new, old = work / "new", work / "old"
    new.mkdir()
    try:
        yield new
        check_output(folder)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
