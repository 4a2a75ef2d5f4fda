"""Reading a bundle: every file is hashed before any engine sees a byte of it.

Three kinds of files are read, and no others: manifest.json, what it lists, and, where the caller says whom to trust,
manifest.sig. The signature is checked first, over the same bytes that are parsed then.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from affect_runtimes._checked import parse_object
from affect_runtimes.compare import Bound
from affect_runtimes.errors import BundleError, IntegrityError, SignatureError
from affect_runtimes.files import read_file
from affect_runtimes.manifest import Graph, Manifest
from affect_runtimes.signing import SIGNATURES, Trust, verify

__all__ = ["Bundle"]

# What is parsed here is some kilobytes, and a few megabytes where a model is large; graphs may be gigabytes.
_MOST_MANIFEST_BYTES = 16 << 20
_MOST_BYTES = {"parity.json": 64 << 20, "verify.npz": 256 << 20, "MODEL_CARD.md": 16 << 20}


class Bundle:
    """A verified folder. The bytes that were hashed are the bytes that engines get: no file is read after its check.

    The bytes stay in memory; `release_graphs` lets go of the large ones.

    Attributes:
        path: the folder.
        manifest: its typed manifest.
        listing: the bytes of manifest.json, which signatures are of.
        signed_by: id of the trusted key that signed it, or None where nobody asked.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        contents: Mapping[str, bytes],
        listing: bytes,
        signed_by: str | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.signed_by = signed_by
        self._contents = dict(contents)
        self._sizes = {name: len(data) for name, data in contents.items()}
        self.listing = listing
        # Where files are read from again, also after the working directory has changed.
        self._folder = path.absolute()

    @classmethod
    def open(cls, path: str | Path, trust: Trust | None = None) -> "Bundle":
        """Reads and verifies a bundle.

        Args:
            path: its folder.
            trust: one public key, or several: PEM, 32 raw bytes, or files with either. Then only a bundle that one of
                them signed is opened. None opens any: what is checked then is that it is whole, not whose it is.

        Raises:
            BundleError: no folder, no manifest, or a manifest that this release cannot use.
            IntegrityError: a file is missing, altered, or outside the folder; the message names it.
            SignatureError: no trusted key signed it as it is.
            InputError: a trusted key that is none.
            MissingDependencyError: cryptography, which only `trust` needs, is not installed.
        """
        folder = Path(path)
        if not folder.is_dir():
            found = "a file" if folder.exists() else "nothing"
            raise BundleError(f"{folder}: a bundle is a folder that affect-export wrote; found {found} there")
        listing = folder / "manifest.json"
        if not listing.is_file():
            raise BundleError(f"{folder}: no manifest.json in it, so it is not a bundle; affect-export writes one")
        try:
            data = read_file(listing, _MOST_MANIFEST_BYTES)
        except OSError as error:
            raise BundleError(f"{listing}: cannot be read ({error})") from None
        # Before anything is parsed.
        signed_by = None if trust is None else _signer(folder, data, trust)
        manifest = Manifest.read(data, str(listing))
        contents = {name: _verified(folder, name, digest) for name, digest in manifest.files.items()}
        for required in ("verify.npz", "parity.json"):
            if required not in contents:
                raise BundleError(f"{listing}: lists no {required}; export the bundle again")
        return cls(folder, manifest, contents, data, signed_by)

    def check_signature(self, trust: Trust) -> str:
        """Checks who signed a bundle that was opened without asking; returns the id of the key.

        Raises:
            SignatureError, InputError, MissingDependencyError: see `open`.
        """
        self.signed_by = _signer(self._folder, self.listing, trust)
        return self.signed_by

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
        return len(self.listing) + sum(self._sizes.values())

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


def _signer(folder: Path, manifest: bytes, trust: Trust) -> str:
    path = folder / SIGNATURES
    try:
        signatures = read_file(path, 1 << 20)
    except FileNotFoundError:
        signatures = None
    except OSError as error:
        raise SignatureError(f"{path}: cannot be read ({error})") from None
    return verify(manifest, signatures, trust, str(path))


def _verified(folder: Path, name: str, digest: str) -> bytes:
    path = folder / name
    try:
        # A link inside the folder may still point out of it.
        if not path.resolve().is_relative_to(folder.resolve()):
            raise IntegrityError(f"{path}: leaves the bundle's folder")
        if not path.is_file():
            raise IntegrityError(f"{path}: missing, though the manifest lists it; copy or export the bundle again")
        data = read_file(path, _MOST_BYTES[name]) if name in _MOST_BYTES else path.read_bytes()
    except MemoryError:
        raise IntegrityError(f"{path}: does not fit into this machine's memory") from None
    except (OSError, RuntimeError) as error:  # until Python 3.13, a ring of links is a RuntimeError
        raise IntegrityError(f"{path}: cannot be read ({error}); copy or export the bundle again") from None
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise IntegrityError(
            f"{path}: {len(data)} bytes with sha256 {found[:12]}..., the manifest says {digest[:12]}...; "
            "the file was cut short or changed, copy or export the bundle again"
        )
    return data
