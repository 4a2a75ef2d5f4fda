"""Where a bundle lands: nobody's files are lost, nothing half-written stays.

A bundle is built beside its place and moved there at once. On Linux one that is there already is exchanged with the
new one in one step, so whenever the process is killed, one of the two is in place, whole. Where the kernel or the file
system cannot do that, there is a moment between two renames; killed in it, the next export puts the earlier one back.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from affect_runtimes.errors import AffectError, InputError
from affect_runtimes.files import sync_folder
from affect_runtimes.signing import SIGNATURES

__all__ = ["check_output_folder", "publish", "scratch_folder"]

_MARKER = "manifest.json"
_UNFINISHED = ".unfinished"
_OLD, _LOCK = "old", "lock"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        known |= {SIGNATURES, f".{SIGNATURES}.part"}  # the second of an affect-sign that was killed
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
        return isinstance(listing["schema"], int) and there <= known
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@contextlib.contextmanager
def scratch_folder(output: Path, dry_run: bool) -> Iterator[Path]:
    """A folder to build in, gone afterwards: beside the output, so that the move is a rename; elsewhere for a dry run.

    Folders above the output are made, and taken away again if what follows fails. So is what exports to the same place
    left that were killed outright.

    Raises:
        InputError: a folder above it cannot be made.
        AffectError: the disk is full; so it is for what happens in the folder.
    """
    parent = output.absolute().parent
    with _room_said(parent), contextlib.nullcontext() if dry_run else _folder_for(parent):
        if not dry_run:
            _sweep(parent, output.name)
        mark = f".{output.name}.{os.getpid()}."
        scratch = Path(tempfile.mkdtemp(prefix=mark, suffix=_UNFINISHED, dir=None if dry_run else parent))
        try:
            with _held(scratch):
                yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _room_said(parent: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        # The system's own words often name no file, let alone what to do.
        raise AffectError(
            f"{error.filename or parent}: no room for what an export builds ({error.strerror}); free some, or choose "
            "an --output on another disk"
        ) from error


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
                if error.errno in _NO_ROOM:
                    raise  # no other place on this disk would help
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


@contextlib.contextmanager
def _held(scratch: Path) -> Iterator[None]:
    """Marks a folder as at work; the kernel takes the mark away when the process dies, whoever has its number then."""
    if os.name != "posix":
        yield
        return
    import fcntl

    new = scratch / f"{_LOCK}.new"
    file = os.open(new, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Only now, so that nobody finds it unlocked while this process lives.
            new.rename(scratch / _LOCK)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise  # a file system without locks: the number of the process has to do
        yield
    finally:
        os.close(file)


def _sweep(parent: Path, name: str) -> None:
    """Removes what exports of the same bundle left that were killed outright; gives back a bundle they had moved."""
    for left in parent.iterdir():
        found = re.fullmatch(rf"\.{re.escape(name)}\.(\d+)\.[^.]+{re.escape(_UNFINISHED)}", left.name)
        if found and not _at_work(left, int(found[1])):
            old, output = left / _OLD, parent / name
            if _is_bundle(old) and not output.exists() and not output.is_symlink():
                old.rename(output)
            shutil.rmtree(left, ignore_errors=True)


def _at_work(scratch: Path, process: int) -> bool:
    try:
        file = os.open(scratch / _LOCK, os.O_RDWR)
    except OSError:
        return _runs(process)
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


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
    _sync(folder)
    if not (output.is_dir() and any(output.iterdir())):
        folder.replace(output)  # also of an empty folder, in one step
    elif _exchange(folder, output):
        if not _is_bundle(folder):  # what came after the check
            _exchange(folder, output)
            check_output_folder(output, force)
    else:
        old = folder.parent / _OLD
        output.rename(old)
        try:
            folder.rename(output)
        except BaseException:
            old.rename(output)
            raise
    sync_folder(output.absolute().parent)


def _sync(folder: Path) -> None:
    """Has the disk take everything before anything is moved, so that a power cut leaves no empty files in place."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


_CURRENT_FOLDER, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux."""


def _exchange(one: Path, other: Path) -> bool:
    """Has two folders change places in one step; False where that cannot be done.

    Raises:
        OSError: it can, but not here.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or a C library without it
        return False
    paths = (ctypes.c_char_p(os.fsencode(path)) for path in (one, other))
    if rename(_CURRENT_FOLDER, next(paths), _CURRENT_FOLDER, next(paths), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
