"""Affect Edge on the device: one frame in, one affect out, with explicit state.

    from affect_edge import Recognizer
    recognizer = Recognizer()
    stream = recognizer.stream()
    for affect in stream.step(frame, timestamp_s):
        print(affect.track_id, affect.valence, affect.arousal, affect.expression)

Errors: see `affect_runtimes.errors`; all derive from `AffectError`.
"""

from affect_edge._affect import Affect
from affect_edge._faces import AffectFaceDetector, Face, FaceDetector, YuNetDetector
from affect_edge._recognizer import Recognizer
from affect_edge._sources import VideoSource, open_source
from affect_edge._stream import Stream
from affect_edge._tracking import TrackerSettings
from affect_runtimes.audio import Audio
from affect_runtimes.errors import (
    AffectError,
    BundleError,
    InputError,
    IntegrityError,
    MissingDependencyError,
    ParityError,
    SourceError,
    StateError,
)
from affect_runtimes.state import State

__version__ = "0.1.0"

__all__ = [
    "Affect",
    "AffectError",
    "AffectFaceDetector",
    "Audio",
    "BundleError",
    "Face",
    "FaceDetector",
    "InputError",
    "IntegrityError",
    "MissingDependencyError",
    "ParityError",
    "Recognizer",
    "SourceError",
    "State",
    "StateError",
    "Stream",
    "TrackerSettings",
    "VideoSource",
    "YuNetDetector",
    "__version__",
    "open_source",
]
