"""Files that appear whole or not at all, also when the process is killed or the power goes."""

import contextlib
import errno
import os
import stat
from pathlib import Path

__all__ = ["read_file", "replace_file", "sync_folder"]

_TRIES = 100


def replace_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Writes a file beside its place and moves it there with one rename.

    What is written to has one name for each path, so what a killed writer left is written over by the next one, and
    several writers of one path take turns: the kernel lets go of a lock when its process dies.

    Args:
        path: whose folder exists.
        data: of the whole file.
        mode: of the new file, whatever the umask says.

    Raises:
        OSError: it cannot be written. What was there before is as it was, and nothing else is left; only where the
            disk fails after the move, the new file is in its place.
    """
    part = path.with_name(f".{path.name}.part")
    file = _locked(part)
    try:
        try:
            os.fchmod(file, mode)
            os.ftruncate(file, 0)
            view = memoryview(data)
            while view:
                view = view[os.write(file, view) :]
            os.fsync(file)
            part.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
    finally:
        os.close(file)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder outlast a power cut; a file system that cannot promise it is left alone."""
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(file)


def read_file(path: Path, most: int) -> bytes:
    """A plain file of at most so many bytes: no pipe that never ends, nothing that fills the memory.

    Raises:
        OSError: it cannot be read, is no plain file (EINVAL), or is larger (EFBIG).
    """
    if not path.is_file():
        # Found out first: opening a named pipe would wait for a writer.
        path.stat()
        raise OSError(errno.EINVAL, "no plain file")
    with path.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"{size} bytes; at most {most} are read")
        # It may grow while it is read.
        data = opened.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most} bytes, which is the most that is read")
    return data


def _locked(part: Path) -> int:
    """Opens the file that is written to, locked, and this user's own."""
    # Not every system that runs bundles has it, and only writers need it.
    import fcntl

    for _ in range(_TRIES):
        file = os.open(part, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            mine = os.fstat(file)
            with contextlib.suppress(FileNotFoundError):
                there = part.stat()
                # Otherwise whoever held the lock has moved it into place: that is a finished file now.
                if (mine.st_ino, mine.st_dev) == (there.st_ino, there.st_dev):
                    # In a folder that others can write to, it may be theirs, or another name of some other file.
                    if not stat.S_ISREG(mine.st_mode) or mine.st_nlink != 1 or mine.st_uid != os.geteuid():
                        raise OSError(errno.EPERM, f"{part} is in the way, and not this user's own")
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    raise OSError(errno.EBUSY, f"{part} is being written by others all the time")
