"""Reading a bundle: every file is hashed before any engine sees a byte of it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from affect_runtimes._checked import parse_object
from affect_runtimes.compare import Bound
from affect_runtimes.errors import BundleError, IntegrityError
from affect_runtimes.manifest import Graph, Manifest

__all__ = ["Bundle"]


class Bundle:
    """A verified folder. The bytes that were hashed are the bytes that engines get: no file is read after its check.

    The bytes stay in memory; `release_graphs` lets go of the large ones.

    Attributes:
        path: the folder.
        manifest: its typed manifest.
    """

    def __init__(self, path: Path, manifest: Manifest, contents: Mapping[str, bytes], manifest_bytes: int) -> None:
        self.path = path
        self.manifest = manifest
        self._contents = dict(contents)
        self._sizes = {name: len(data) for name, data in contents.items()}
        self._manifest_bytes = manifest_bytes
        # Where files are read from again, also after the working directory has changed.
        self._folder = path.absolute()

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
        try:
            data = listing.read_bytes()
        except OSError as error:
            raise BundleError(f"{listing}: cannot be read ({error})") from None
        manifest = Manifest.read(data, str(listing))
        contents = {name: _verified(folder, name, digest) for name, digest in manifest.files.items()}
        for required in ("verify.npz", "parity.json"):
            if required not in contents:
                raise BundleError(f"{listing}: lists no {required}; export the bundle again")
        return cls(folder, manifest, contents, len(data))

    def read(self, name: str) -> bytes:
        """The verified bytes of a listed file; one that was released is read and verified again, and not kept.

        Raises:
            BundleError: the manifest lists no such file.
            IntegrityError: a released file has been changed or removed since.
        """
        files = self.manifest.files
        if name not in files:
            raise BundleError(f"{self.path}: {name!r} is not listed; listed: {', '.join(files)}")
        kept = self._contents.get(name)
        return _verified(self._folder, name, files[name]) if kept is None else kept

    def read_graph(self, graph: Graph) -> tuple[bytes, bytes | None]:
        """The verified bytes of a graph and of its large tensors, if these are elsewhere; see `read`."""
        return self.read(graph.file), None if graph.data is None else self.read(graph.data)

    def release_graphs(self) -> None:
        """Lets go of the bytes of the graphs and their data, once engines have copies of their own.

        Safe to call twice, and while another thread reads. `read` still gives every file, and the sizes stay known.
        """
        for name in self._graph_files():
            self._contents.pop(name, None)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, the manifest's included."""
        return self._manifest_bytes + sum(self._sizes.values())

    @property
    def graph_bytes(self) -> int:
        """Bytes of the graphs and their data alone: what engines load."""
        return sum(self._sizes[name] for name in self._graph_files())

    @property
    def parity(self) -> dict[str, Any]:
        """The parsed parity.json.

        Raises:
            BundleError: it is no JSON object.
        """
        return parse_object(self.read("parity.json"), str(self.path / "parity.json"))

    @property
    def bounds(self) -> list[Bound]:
        """The parity bounds that the export held the bundle to."""
        return list(self.manifest.bounds)

    @property
    def model_name(self) -> str:
        """Name of the model, such as "student"."""
        return self.manifest.model_name

    @property
    def target_name(self) -> str:
        """Name of the target, such as "cpu"."""
        return self.manifest.target_name

    def _graph_files(self) -> set[str]:
        # A set: two graphs may share a file.
        return set().union(*(g.files for g in self.manifest.graphs))

    def __repr__(self) -> str:
        m = self.manifest
        return f"Bundle({self.path}, {m.model_name} {m.model_version} for {m.target_name} on {m.engine})"


def _verified(folder: Path, name: str, digest: str) -> bytes:
    path = folder / name
    try:
        # A link inside the folder may still point out of it.
        if not path.resolve().is_relative_to(folder.resolve()):
            raise IntegrityError(f"{path}: leaves the bundle's folder")
        if not path.is_file():
            raise IntegrityError(f"{path}: missing, though the manifest lists it; copy or export the bundle again")
        data = path.read_bytes()
    except (OSError, RuntimeError) as error:  # until Python 3.13, a ring of links is a RuntimeError
        raise IntegrityError(f"{path}: cannot be read ({error}); copy or export the bundle again") from None
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise IntegrityError(
            f"{path}: {len(data)} bytes with sha256 {found[:12]}..., the manifest says {digest[:12]}...; "
            "the file was cut short or changed, copy or export the bundle again"
        )
    return data
