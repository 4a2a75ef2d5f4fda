"""Affect Edge on the device: one frame in, one affect out, with explicit state.

    from affect_edge import Recognizer
    recognizer = Recognizer()
    stream = recognizer.stream()
    for affect in stream.step(frame, timestamp_s):
        print(affect.track_id, affect.valence, affect.arousal, affect.expression)

Errors: see `affect_runtimes.errors`; all derive from `AffectError`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from affect_edge._affect import Affect
from affect_edge._faces import AffectFaceDetector, Face, FaceDetector, YuNetDetector
from affect_edge._gap import GapPolicy
from affect_edge._recognizer import Recognizer
from affect_edge._stream import Moment, Stream
from affect_edge._tracking import TrackerSettings
from affect_runtimes.audio import Audio
from affect_runtimes.errors import (
    AffectError,
    BundleError,
    DeviceError,
    InputError,
    IntegrityError,
    MissingDependencyError,
    ParityError,
    SignatureError,
    SourceError,
    StateError,
)
from affect_runtimes.state import State

if TYPE_CHECKING:
    from affect_edge._microphone import MicrophoneInfo, MicrophoneSettings, list_microphones
    from affect_edge._perclos import Perclos
    from affect_edge._sound import MissingSound, PushSound, SoundSource, open_sound
    from affect_edge._source_file import VideoSource
    from affect_edge._source_push import PushSource
    from affect_edge._source_types import CameraSettings, FrameSource, SourceEvent, SourceStats
    from affect_edge._sources import open_source
    from affect_edge._voice import VoiceMoment, VoiceStream

__version__ = "0.1.0"

__all__ = [
    "Affect",
    "AffectError",
    "AffectFaceDetector",
    "Audio",
    "BundleError",
    "CameraSettings",
    "DeviceError",
    "Face",
    "FaceDetector",
    "FrameSource",
    "GapPolicy",
    "InputError",
    "IntegrityError",
    "MicrophoneInfo",
    "MicrophoneSettings",
    "MissingDependencyError",
    "MissingSound",
    "Moment",
    "ParityError",
    "Perclos",
    "PushSound",
    "PushSource",
    "Recognizer",
    "SignatureError",
    "SoundSource",
    "SourceError",
    "SourceEvent",
    "SourceStats",
    "State",
    "StateError",
    "Stream",
    "TrackerSettings",
    "VideoSource",
    "VoiceMoment",
    "VoiceStream",
    "YuNetDetector",
    "__version__",
    "list_microphones",
    "open_sound",
    "open_source",
]

# Sources, sound and what is made of results are loaded when they are first named: a device that pushes its own crops
# into `Recognizer.step` waits for none of it at start.
_LATER = {
    "CameraSettings": "_source_types",
    "FrameSource": "_source_types",
    "MicrophoneInfo": "_microphone",
    "MicrophoneSettings": "_microphone",
    "MissingSound": "_sound",
    "Perclos": "_perclos",
    "PushSound": "_sound",
    "PushSource": "_source_push",
    "SoundSource": "_sound",
    "SourceEvent": "_source_types",
    "SourceStats": "_source_types",
    "VideoSource": "_source_file",
    "VoiceMoment": "_voice",
    "VoiceStream": "_voice",
    "list_microphones": "_microphone",
    "open_sound": "_sound",
    "open_source": "_sources",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
