"""Where a bundle lands: nobody's files are lost, nothing half-written stays."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from affect_runtimes.errors import InputError

__all__ = ["check_output_folder", "publish", "scratch_folder"]

_MARKER = "manifest.json"
_UNFINISHED = ".unfinished"


def check_output_folder(output: Path, force: bool) -> None:
    """Refuses a place where something of somebody else's would be lost.

    Raises:
        InputError: a file, a folder that is not a bundle, or a bundle without `force`.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir():
        raise InputError(f"{output}: exists and is not a folder; choose another --output")
    if not any(output.iterdir()):
        return
    if not _is_bundle(output):
        raise InputError(
            f"{output}: exists, is not empty and is not a bundle of affect-export; choose another --output"
        )
    if not force:
        raise InputError(f"{output}: holds a bundle already; --force replaces it")


def _is_bundle(folder: Path) -> bool:
    try:
        listing = json.loads((folder / _MARKER).read_text())
        known = {_MARKER, *listing["files"], *(g["file"] for g in listing["graphs"])}
        return isinstance(listing["schema"], int) and {p.name for p in folder.iterdir()} <= known
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def scratch_folder(output: Path, dry_run: bool) -> Iterator[Path]:
    """A folder to build in, gone afterwards: beside the output, so that the move is a rename; elsewhere for a dry run.

    Folders above the output are made, and taken away again if what follows fails. So is what exports to the same place
    left that were killed outright.

    Raises:
        InputError: a folder above it cannot be made.
    """
    parent = output.absolute().parent
    with contextlib.nullcontext() if dry_run else _folder_for(parent):
        if not dry_run:
            _sweep(parent, output.name)
        mark = f".{output.name}.{os.getpid()}."
        scratch = Path(tempfile.mkdtemp(prefix=mark, suffix=_UNFINISHED, dir=None if dry_run else parent))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _folder_for(parent: Path) -> Iterator[None]:
    """Makes a folder and those above it; takes away again what it made, if what follows fails."""
    made: list[Path] = []
    try:
        for folder in reversed((parent, *parent.parents)):
            if folder.is_dir():
                continue
            try:
                folder.mkdir()
            except OSError as error:
                if folder.is_dir():  # somebody else was faster
                    continue
                raise InputError(
                    f"--output: the folder {folder} cannot be made ({error.strerror}); choose another place"
                ) from None
            made.append(folder)
        yield
    except BaseException:
        # Only while empty: somebody may have put something there meanwhile.
        with contextlib.suppress(OSError):
            for folder in reversed(made):
                folder.rmdir()
        raise


def _sweep(parent: Path, name: str) -> None:
    """Removes what exports of the same bundle left that were killed outright."""
    for left in parent.iterdir():
        found = re.fullmatch(rf"\.{re.escape(name)}\.(\d+)\.[^.]+{re.escape(_UNFINISHED)}", left.name)
        if found and not _runs(int(found[1])):
            shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    if os.name != "posix":
        return True  # asking would end it there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def publish(folder: Path, output: Path, force: bool) -> None:
    """Moves a finished bundle into its place.

    Raises:
        InputError: see `check_output_folder`.
    """
    # Once more: an export takes minutes, in which somebody may have put something there.
    check_output_folder(output, force)
    folder.chmod(0o755)
    if output.is_dir() and any(output.iterdir()):
        old = folder.parent / "old"
        output.rename(old)
        try:
            folder.rename(output)
        except BaseException:
            old.rename(output)
            raise
    else:
        if output.is_dir():
            output.rmdir()
        folder.rename(output)
