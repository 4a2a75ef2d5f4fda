"""`affect-keygen` and `affect-sign`: who stands for a bundle; `affect_runtimes.signing` says what is signed and how.

Both work where only the device's package is installed: a key may live on a machine that never sees torch.
"""

import argparse
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from affect_export._commands import exit_code, require
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import InputError
from affect_runtimes.files import read_file, replace_file
from affect_runtimes.signing import SIGNATURES, key_id, read_signatures, sign, verify

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["keygen_main", "sign_main"]

_MOST_BYTES = 64 * 1024


def keygen_main(argv: list[str] | None = None) -> int:
    """Makes a key pair: the private key for affect-sign, and KEYFILE.pub for the devices that trust it."""
    parser = argparse.ArgumentParser(prog="affect-keygen", description=keygen_main.__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="KEYFILE", help="where the private key goes")
    _add_passphrase(parser, "encrypts the private key")
    arguments = parser.parse_args(argv)
    return exit_code("affect-keygen", lambda: _keygen(arguments))


def sign_main(argv: list[str] | None = None) -> int:
    """Signs a bundle: writes manifest.sig beside its manifest, once every file of it is found as the manifest says."""
    parser = argparse.ArgumentParser(prog="affect-sign", description=sign_main.__doc__)
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument("--key", type=Path, required=True, metavar="KEYFILE", help="private key of affect-keygen")
    parser.add_argument("--add", action="store_true", help="keep the signatures of others that are there")
    _add_passphrase(parser, "opens the private key")
    arguments = parser.parse_args(argv)
    return exit_code("affect-sign", lambda: _sign(arguments))


def _add_passphrase(parser: argparse.ArgumentParser, does: str) -> None:
    # Not as an argument itself: those of a process are for everybody to see.
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--passphrase-env", metavar="NAME", help=f"environment variable with the passphrase; {does}")
    group.add_argument("--passphrase-file", type=Path, metavar="FILE", help="file with it in its first line")


def _passphrase(arguments: argparse.Namespace) -> bytes | None:
    """The words that were given, or None where none were asked for; empty ones are a slip, not a choice.

    Raises:
        InputError: there are none where they were said to be.
    """
    if (name := arguments.passphrase_env) is not None:
        words = os.environ.get(name, "").encode()
        where = f"--passphrase-env: ${name}"
    elif (path := arguments.passphrase_file) is not None:
        where = f"--passphrase-file {path}"
        try:
            words = read_file(path, _MOST_BYTES).split(b"\n", 1)[0].removesuffix(b"\r")
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror or error})") from None
    else:
        return None
    if not words:
        raise InputError(f"{where} holds no passphrase")
    return words


def _keygen(arguments: argparse.Namespace) -> None:
    require("cryptography", extra="trust")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    words = _passphrase(arguments)
    private, public = arguments.output, arguments.output.with_name(f"{arguments.output.name}.pub")
    key = Ed25519PrivateKey.generate()
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if words is not None:
        encryption = serialization.BestAvailableEncryption(words)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    # The public half first: where it cannot be written, no private key is left lying about.
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    _create(public, key.public_key().public_bytes(pem, spki), 0o644, private)
    try:
        _create(private, key.private_bytes(pem, pkcs8, encryption), 0o600, private)
    except BaseException:
        public.unlink(missing_ok=True)
        raise
    print(f"{key_id(key.public_key())}: private key in {private}, public key for devices in {public}")


def _create(path: Path, data: bytes, mode: int, asked: Path) -> None:
    """A file that was not there before, with this mode from its first moment."""
    if asked.exists() or asked.is_symlink():
        raise InputError(f"--output: {asked} exists; a key is never written over")
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise InputError(f"--output: {path} exists; a key is never written over") from None
    except FileNotFoundError:
        raise InputError(f"--output: there is no folder {path.parent}") from None
    try:
        with os.fdopen(file, "wb") as opened:
            os.fchmod(opened.fileno(), mode)
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _sign(arguments: argparse.Namespace) -> None:
    require("cryptography", extra="trust")
    key = _private(arguments.key, _passphrase(arguments))
    # What cannot be opened is not signed: every file is as the manifest says.
    bundle = Bundle.open(arguments.bundle)
    path = bundle.path / SIGNATURES
    there = read_file(path, _MOST_BYTES) if path.exists() else None
    own = key_id(key.public_key())
    if there is not None and not arguments.add:
        others = ", ".join(name for name, _ in read_signatures(there, str(path)))
        raise InputError(f"{path}: there already, with signatures of {others}; --add adds one, or remove the file")
    signatures = sign(bundle.listing, key, there)
    verify(bundle.listing, signatures, key.public_key().public_bytes_raw())
    # As readable as the rest of the bundle.
    replace_file(path, signatures, stat.S_IMODE((bundle.path / "manifest.json").stat().st_mode) & 0o644 | 0o600)
    print(f"{bundle.path}: signed by {own}")


def _private(path: Path, passphrase: bytes | None) -> "Ed25519PrivateKey":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        data = read_file(path, _MOST_BYTES)
    except OSError as error:
        raise InputError(f"--key {path}: cannot be read ({error.strerror or error})") from None
    try:
        key = load_pem_private_key(data, passphrase)
    except TypeError:
        has = "is not encrypted, and a passphrase was given" if passphrase else "is encrypted: give its passphrase"
        raise InputError(f"--key {path}: {has}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"--key {path}: no private key of affect-keygen, or another passphrase") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"--key {path}: a key of another algorithm ({type(key).__name__}); bundles take Ed25519")
    return key


if __name__ == "__main__":
    sys.exit(sign_main())
