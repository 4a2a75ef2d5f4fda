"""The one error tree of Affect Edge::

AffectError                what was asked, what was found, what would work
  InputError               a frame, crop, time or option that cannot be used (also a ValueError)
  StateError               a state of another model, or bytes that are not a state
  SourceError              a video or camera that is missing, unreadable or silent
  BundleError              a folder that is not a usable bundle
    IntegrityError         a file of a bundle that is missing, changed or outside it
      SignatureError       a bundle that no trusted key signed as it is
  ParityError              an engine or artefact outside its stated bound
  DeviceError              a GPU, its driver or the cache of its engines that cannot be used (also a RuntimeError)
  MissingDependencyError   an optional library that is not installed (also an ImportError)
"""

__all__ = [
    "AffectError",
    "BundleError",
    "DeviceError",
    "InputError",
    "IntegrityError",
    "MissingDependencyError",
    "ParityError",
    "SignatureError",
    "SourceError",
    "StateError",
]


class AffectError(Exception):
    """Base of every error that Affect Edge raises on purpose."""


class InputError(AffectError, ValueError):
    """A value handed in by the caller cannot be used."""


class StateError(AffectError, ValueError):
    """A recurrent state does not belong to this model, or its bytes are damaged."""


class SourceError(AffectError, OSError):
    """A video file or camera cannot be opened or gives nothing."""


class BundleError(AffectError):
    """A folder is not a bundle that this version can run."""


class IntegrityError(BundleError):
    """A file of a bundle is missing, altered, or outside the bundle's folder."""


class SignatureError(IntegrityError):
    """A bundle is not signed, or not by a key that the caller trusts, or was changed since."""


class ParityError(AffectError):
    """An artefact's outputs lie outside the bound stated against its float model."""


class DeviceError(AffectError, RuntimeError):
    """A device that a bundle needs is not there, or refuses; nothing falls back to another one."""


class MissingDependencyError(AffectError, ImportError):
    """An optional library is needed and not installed; the message carries the pip line."""
