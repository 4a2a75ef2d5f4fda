"""Engines that a device builds for itself, kept from one start to the next.

An entry is a folder named after a digest of its key. It is written beside its place and moved there with one rename, so
it is whole or absent; a lock for each entry has two processes build it once. What is read back is hashed first: an
engine is native code.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from affect_runtimes.errors import AffectError, DeviceError
from affect_runtimes.files import replace_file, sync_folder

__all__ = ["ENVIRONMENT", "EngineCache", "announce"]

ENVIRONMENT = "AFFECT_EDGE_CACHE"
"""Environment variable that names another folder than the default."""
T = TypeVar("T")
_log = logging.getLogger(__name__)
_DATA, _ENTRY, _VERDICT = "engine", "entry.json", "verdict.json"
_POLL_S, _SAY_AFTER_S = 0.1, 1.0
_SPARE_BYTES = 16 << 20


def announce(words: str) -> None:
    """Says what takes long, to whoever watches a terminal, and to the log."""
    _log.info(words)
    if sys.stderr.isatty():
        print(words, file=sys.stderr)


class EngineCache:
    """A folder of built engines.

    Args:
        root: the folder; None is $AFFECT_EDGE_CACHE, or affect-edge in the user's cache folder ($XDG_CACHE_HOME,
            ~/.cache). It is made when it is first written to.
        say: is told what takes long.
    """

    def __init__(self, root: str | Path | None = None, say: Callable[[str], None] = lambda words: None) -> None:
        self.root = Path(root or os.environ.get(ENVIRONMENT) or _default())
        self._say = say

    def fetch(self, key: Mapping[str, str], make: Callable[[], bytes], room: int) -> tuple[bytes, Path]:
        """What was kept under a key, or what `make` gives, which is kept from now on.

        Args:
            key: everything that another engine would have to be built for.
            make: builds it; called with the entry's lock held.
            room: bytes that it is likely to take.

        Returns:
            The engine and its entry.

        Raises:
            DeviceError: the folder cannot be used, is open to others, or has no room.
        """
        entry = self._prepared() / _digest(key)
        found = _read(entry, key)
        if found is not None:
            return found, entry
        with self._locked(entry):
            found = _read(entry, key)  # another process has built it meanwhile
            if found is not None:
                return found, entry
            self._clear(entry)
            try:
                free = shutil.disk_usage(self.root).free
            except OSError as error:
                raise _unusable(self.root, error) from None
            if free < room + _SPARE_BYTES:
                raise DeviceError(
                    _no_room(self.root, f"{free >> 20} MB free, some {(room + _SPARE_BYTES) >> 20} needed")
                )
            data = make()
            self._publish(entry, data, key)
        return data, entry

    def load(
        self,
        key: Mapping[str, str],
        make: Callable[[], bytes],
        room: int,
        use: Callable[[bytes, Path], T],
        refused: type[AffectError],
        what: str,
    ) -> T:
        """What `use` makes of an entry. One that it refuses is made once more: something changed under its version.

        Args:
            key: see `fetch`.
            make: see `fetch`.
            room: see `fetch`.
            use: takes what was kept or made, and the entry.
            refused: how `use` says that it cannot be used.
            what: for people, such as "the kept engine".

        Raises:
            DeviceError: see `fetch`.
            AffectError: what was made anew is refused, too.
        """
        data, entry = self.fetch(key, make, room)
        try:
            return use(data, entry)
        except refused:
            self._say(f"{what} does not load; making it again")
            self.drop(entry)
        return use(*self.fetch(key, make, room))

    def drop(self, entry: Path) -> None:
        """Forgets an entry that turned out to be of no use."""
        with self._locked(entry):
            self._clear(entry)

    def verdict(self, key: Mapping[str, str]) -> dict[str, Any] | None:
        """What `keep_verdict` kept under a key, or None.

        Raises:
            DeviceError: others can write to the folder.
        """
        try:
            _check_closed(self.root, self.root.stat())
            kept = json.loads((self.root / _digest(key) / _VERDICT).read_text())
        except (OSError, ValueError, RecursionError):
            return None
        ours = isinstance(kept, dict) and kept.get("key") == dict(key) and isinstance(kept.get("verdict"), dict)
        return kept["verdict"] if ours else None

    def keep_verdict(self, key: Mapping[str, str], verdict: Mapping[str, Any]) -> None:
        """Keeps what a device found out about itself, so that it need not again at its next start.

        Raises:
            DeviceError: see `fetch`.
        """
        folder = self._prepared() / _digest(key)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            replace_file(folder / _VERDICT, json.dumps({"key": dict(key), "verdict": dict(verdict)}, indent=1).encode())
        except OSError as error:
            raise _unusable(self.root, error) from None

    def _prepared(self) -> Path:
        """The folder, made and checked: whoever can write here can run code as this user."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.root.stat()
        except OSError as error:
            raise _unusable(self.root, error) from None
        _check_closed(self.root, found)
        return self.root

    @contextlib.contextmanager
    def _locked(self, entry: Path) -> Iterator[None]:
        """Holds the entry's lock; the kernel lets go of it when a process dies."""
        try:
            file = os.open(entry.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(self.root, error) from None
        try:
            began, told = time.monotonic(), False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not told and time.monotonic() - began > _SAY_AFTER_S:
                        self._say("another process builds this engine; waiting for it")
                        told = True
                    time.sleep(_POLL_S)
                except OSError as error:  # some network folders have no locks
                    raise _unusable(self.root, error) from None
            yield
        finally:
            os.close(file)

    def _clear(self, entry: Path) -> None:
        """Removes an entry, and what a killed build left of it; the lock is held."""
        for path in (entry, *self.root.glob(f".{entry.name}.*")):
            shutil.rmtree(path, ignore_errors=True)

    def _publish(self, entry: Path, data: bytes, key: Mapping[str, str]) -> None:
        described = {"key": dict(key), "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(dir=self.root, prefix=f".{entry.name}."))
            replace_file(folder / _DATA, data)
            replace_file(folder / _ENTRY, json.dumps(described, indent=1).encode())
            folder.rename(entry)
            sync_folder(self.root)
        except OSError as error:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise _unusable(self.root, error) from None


def _default() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "affect-edge"
    try:
        return Path.home() / ".cache" / "affect-edge"
    except RuntimeError:
        raise DeviceError(f"this user has no home to keep built engines in; name a folder in ${ENVIRONMENT}") from None


def _check_closed(root: Path, found: os.stat_result) -> None:
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise DeviceError(
            f"{root}: built engines are native code, and others can write to this folder (owner {found.st_uid}, mode "
            f"{stat.S_IMODE(found.st_mode):o}); chmod 700 it as its owner, or name another one in ${ENVIRONMENT}"
        )


def _read(entry: Path, key: Mapping[str, str]) -> bytes | None:
    """The engine of an entry, or None where there is none, or one that is not what was written."""
    try:
        described = json.loads((entry / _ENTRY).read_text())
        data = (entry / _DATA).read_bytes()
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(described, dict) and described.get("key") == dict(key)
    return data if whole and hashlib.sha256(data).hexdigest() == described.get("sha256") else None


def _digest(key: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(sorted(key.items()))).encode()).hexdigest()[:32]


def _unusable(root: Path, error: OSError) -> DeviceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DeviceError(_no_room(root, error.strerror or "no space"))
    return DeviceError(
        f"{root}: built engines cannot be kept here ({error.strerror or error}); name a folder of your own in "
        f"${ENVIRONMENT}"
    )


def _no_room(root: Path, found: str) -> str:
    return f"{root}: no room to keep a built engine ({found}); free some, or name another folder in ${ENVIRONMENT}"
