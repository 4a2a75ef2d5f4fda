"""Reading a bundle: every file is hashed before any engine sees a byte of it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from affect_runtimes.compare import Bound
from affect_runtimes.errors import BundleError, IntegrityError
from affect_runtimes.manifest import Manifest

__all__ = ["Bundle"]


class Bundle:
    """A verified folder. The bytes that were hashed are the bytes that engines get: nothing is read twice.

    Attributes:
        path: the folder.
        manifest: its typed manifest.
    """

    def __init__(self, path: Path, manifest: Manifest, contents: Mapping[str, bytes], manifest_bytes: int) -> None:
        self.path = path
        self.manifest = manifest
        self._contents = dict(contents)
        self._manifest_bytes = manifest_bytes

    @classmethod
    def open(cls, path: str | Path) -> "Bundle":
        """Reads and verifies a bundle.

        Raises:
            BundleError: no folder, no manifest, or a manifest that this release cannot use.
            IntegrityError: a file is missing, altered, or outside the folder; the message names it.
        """
        folder = Path(path)
        if not folder.is_dir():
            found = "a file" if folder.exists() else "nothing"
            raise BundleError(f"{folder}: a bundle is a folder that affect-export wrote; found {found} there")
        listing = folder / "manifest.json"
        if not listing.is_file():
            raise BundleError(f"{folder}: no manifest.json in it, so it is not a bundle; affect-export writes one")
        data = listing.read_bytes()
        manifest = Manifest.read(data, str(listing))
        contents = {name: _verified(folder, name, digest) for name, digest in manifest.files.items()}
        for required in ("verify.npz", "parity.json"):
            if required not in contents:
                raise BundleError(f"{listing}: lists no {required}; export the bundle again")
        return cls(folder, manifest, contents, len(data))

    def read(self, name: str) -> bytes:
        """The verified bytes of a listed file."""
        try:
            return self._contents[name]
        except KeyError:
            raise BundleError(f"{self.path}: {name!r} is not listed; listed: {', '.join(self._contents)}") from None

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, the manifest's included."""
        return self._manifest_bytes + sum(len(c) for c in self._contents.values())

    @property
    def graph_bytes(self) -> int:
        """Bytes of the graphs alone: what an engine loads."""
        return sum(len(self._contents[g.file]) for g in self.manifest.graphs)

    @property
    def parity(self) -> dict[str, Any]:
        """The parsed parity.json."""
        report: dict[str, Any] = json.loads(self.read("parity.json"))
        return report

    @property
    def bounds(self) -> list[Bound]:
        """The parity bounds that the export held the bundle to."""
        return [Bound(**b) for b in self.manifest.raw["parity"]["bounds"]]

    @property
    def model_name(self) -> str:
        """Name of the model, such as "student"."""
        return self.manifest.model_name

    @property
    def target_name(self) -> str:
        """Name of the target, such as "cpu"."""
        return self.manifest.target_name

    def __repr__(self) -> str:
        m = self.manifest
        return f"Bundle({self.path}, {m.model_name} {m.model_version} for {m.target_name} on {m.engine})"


def _verified(folder: Path, name: str, digest: str) -> bytes:
    path = folder / name
    # A link inside the folder may still point out of it.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise IntegrityError(f"{path}: leaves the bundle's folder")
    if not path.is_file():
        raise IntegrityError(f"{path}: missing, though the manifest lists it; copy or export the bundle again")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise IntegrityError(
            f"{path}: {len(data)} bytes with sha256 {found[:12]}..., the manifest says {digest[:12]}...; "
            "the file was cut short or changed, copy or export the bundle again"
        )
    return data
