"""What a model takes, gives and carries: the part of a manifest that a model states about itself.

Each class writes itself with `to_json`; the `read_` functions check what they are given and say what is wrong.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from affect_runtimes.errors import BundleError, InputError
from affect_runtimes.filters import check_settings

__all__ = [
    "AudioInput",
    "Filter",
    "ImageInput",
    "Input",
    "LandmarkInput",
    "LogMel",
    "Output",
    "StateTensor",
    "Tensor",
    "check_names",
    "read_input",
    "read_output",
    "read_state",
    "read_tensor",
]

Shape = tuple[int | str, ...]
_KINDS = ("regression", "distribution", "multilabel")
_ALIGNMENTS = ("eyes", "box")
_LANDMARK_COUNTS = {"ibug-68": 68}


@dataclass(frozen=True)
class Tensor:
    """One array of a graph or state; a dimension is a size or the word "batch"."""

    name: str
    shape: Shape
    dtype: str

    @property
    def batch_axis(self) -> int:
        return self.shape.index("batch")

    def sized(self, batch: int) -> tuple[int, ...]:
        """The shape for a given number of streams."""
        return tuple(batch if d == "batch" else int(d) for d in self.shape)


@dataclass(frozen=True)
class Filter:
    """One picture filter that runs on the device before normalisation; see `affect_runtimes.filters`."""

    name: str
    settings: Mapping[str, float]


@dataclass(frozen=True)
class ImageInput:
    """A face crop, given as (size, size, 3) RGB pixels in [0, 255].

    Attributes:
        name: of the input, and of the encoder graph's input (batch, 3, size, size).
        size: side in pixels.
        mean: per channel, on the [0, 1] scale.
        std: per channel, on the [0, 1] scale.
        align: "eyes" (eye centres at fixed places, `preprocess.align_face`) or "box" (the upright face box).
        growth: for "box": added to each side of the detector's box, as a fraction of the box.
        filters: run on the uint8 crop, in order, before normalisation.
    """

    name: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    align: str = "eyes"
    growth: float = 0.0
    filters: tuple[Filter, ...] = ()

    @property
    def graph_inputs(self) -> tuple[Tensor, ...]:
        """What the encoder graph takes of it."""
        return (Tensor(self.name, ("batch", 3, self.size, self.size), "float32"),)

    def to_json(self) -> dict[str, Any]:
        filters = [{"name": f.name, **f.settings} for f in self.filters]
        return {
            "name": self.name,
            "kind": "image",
            "shape": ["batch", 3, self.size, self.size],
            "dtype": "float32",
            "colour": "rgb",
            "mean": list(self.mean),
            "std": list(self.std),
            "align": self.align,
            **({"growth": self.growth} if self.align == "box" else {}),
            **({"filters": filters} if filters else {}),
        }


@dataclass(frozen=True)
class LandmarkInput:
    """Face landmarks (count, 2) float32 as fractions of the crop: x right, y down, (0, 0) and (1, 1) its corners.

    Attributes:
        name: of the input, and of the encoder graph's input (batch, count, 2).
        order: "ibug-68", the order of the iBUG 300-W annotation; see `affect_runtimes.landmarks`.
    """

    name: str
    order: str = "ibug-68"

    @property
    def count(self) -> int:
        return _LANDMARK_COUNTS[self.order]

    @property
    def graph_inputs(self) -> tuple[Tensor, ...]:
        """What the encoder graph takes of it."""
        return (Tensor(self.name, ("batch", self.count, 2), "float32"),)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": "landmarks",
            "shape": ["batch", self.count, 2],
            "dtype": "float32",
            "order": self.order,
            "unit": "fraction of the crop",
        }


@dataclass(frozen=True)
class LogMel:
    """A log-mel spectrogram, made on the device by `affect_runtimes.mel.log_mel`.

    Attributes:
        bins: mel bands.
        frame: samples of one analysis window.
        hop: samples between windows.
        fft: length of the transform, at least `frame`.
        low_hz: lower edge of the lowest band.
        high_hz: upper edge of the highest band, at most half the sample rate.
        mean: of the training data's values, subtracted.
        std: of the training data's values, divided by.
    """

    bins: int = 128
    frame: int = 400
    hop: int = 160
    fft: int = 512
    low_hz: float = 20.0
    high_hz: float = 8000.0
    mean: float = 0.0
    std: float = 1.0

    def frames(self, samples: int) -> int:
        """Analysis windows that fit into so many samples; none hangs over the edge."""
        return 1 + (samples - self.frame) // self.hop


@dataclass(frozen=True)
class AudioInput:
    """Mono sound in [-1, 1], given chunk by chunk; the model sees the last `window` samples.

    The ring of samples is a state of the stream that the runtime keeps (`affect_runtimes.audio`), under this input's
    name; no graph takes it. Graph inputs made from it: `waveform` (batch, window) and `log_mel` (batch, frames, bins),
    as far as the model wants them, and for optional audio `NAME_present` (batch,), 1 or 0.

    Attributes:
        name: of the input and of its state.
        rate_hz: sample rate.
        window: samples the model sees at each step.
        hop: samples that a step usually brings; any other number up to `window` works.
        optional: whether a step may come without sound.
        waveform: whether the encoder takes the samples themselves.
        log_mel: the spectrogram that the encoder takes, or None.
    """

    name: str
    rate_hz: int
    window: int
    hop: int
    optional: bool = False
    waveform: bool = True
    log_mel: LogMel | None = None

    @property
    def graph_inputs(self) -> tuple[Tensor, ...]:
        """What the encoder graph takes of it."""
        tensors = []
        if self.waveform:
            tensors.append(Tensor("waveform", ("batch", self.window), "float32"))
        if self.log_mel is not None:
            shape = ("batch", self.log_mel.frames(self.window), self.log_mel.bins)
            tensors.append(Tensor("log_mel", shape, "float32"))
        if self.optional:
            tensors.append(Tensor(f"{self.name}_present", ("batch",), "float32"))
        return tuple(tensors)

    @property
    def state(self) -> "StateTensor":
        """The ring of samples, oldest first; it begins silent."""
        return StateTensor(self.name, ("batch", self.window), "float32", kept_by="runtime")

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        if self.log_mel is None:
            del values["log_mel"]
        return {"name": self.name, "kind": "audio", **values}


Input = ImageInput | LandmarkInput | AudioInput


def check_names(model: str, taken: Iterable[Input], given: Iterable[str]) -> None:
    """Checks which inputs a step is given, before anything is done with them.

    Raises:
        InputError: one is missing, or there is one that the model does not take.
    """
    needed, allowed = set(), set()
    for each in taken:
        allowed.add(each.name)
        if isinstance(each, AudioInput) and each.optional:
            allowed.add(f"{each.name}_present")
        else:
            needed.add(each.name)
    found = set(given)
    if not needed <= found <= allowed:
        raise InputError(f"{model} takes {', '.join(sorted(allowed))}; found {', '.join(sorted(found)) or 'nothing'}")


@dataclass(frozen=True)
class Output:
    """One output of a step.

    Attributes:
        name: a field's name of `affect_edge.Affect` where there is one for it.
        kind: regression, distribution (a label an entry, sums to 1) or multilabel (each entry in its range).
        range: lowest and highest value.
        labels: of the entries; empty for a single regression value.
        signal: what it was taught from: "label", or the word for a substitute, such as "proxy".
        smoothing_s: time constant in seconds of the filter that a stream lays over the output; None for none.
    """

    name: str
    kind: str
    range: tuple[float, float]
    labels: tuple[str, ...] = ()
    signal: str = "label"
    smoothing_s: float | None = None

    @property
    def tensor(self) -> Tensor:
        """(batch,) for a single value, else (batch, labels)."""
        return Tensor(self.name, ("batch", len(self.labels)) if self.labels else ("batch",), "float32")

    def to_json(self) -> dict[str, Any]:
        low, high = (int(v) if v == int(v) else v for v in self.range)
        return {
            "name": self.name,
            "kind": self.kind,
            "range": [low, high],
            **({"labels": list(self.labels)} if self.labels else {}),
            "signal": self.signal,
            **({} if self.smoothing_s is None else {"smoothing_s": self.smoothing_s}),
        }


@dataclass(frozen=True)
class StateTensor(Tensor):
    """What a stream carries.

    Attributes:
        initial: the value that every entry begins with.
        kept_by: "graph" (the step takes NAME and gives next_NAME) or "runtime" (the runtime updates it).
    """

    initial: float = 0.0
    kept_by: str = "graph"

    def to_json(self) -> dict[str, Any]:
        kept = {} if self.kept_by == "graph" else {"kept_by": self.kept_by}
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, "init": self.initial, **kept}


def read_tensor(raw: Mapping[str, Any]) -> Tensor:
    shape: Shape = tuple(raw["shape"])
    sizes = [d for d in shape if d != "batch"]
    if shape.count("batch") != 1 or any(not isinstance(d, int) or isinstance(d, bool) or d < 1 for d in sizes):
        raise BundleError(f"{raw['name']!r}: shape {shape} needs exactly one 'batch' and otherwise positive sizes")
    if raw["dtype"] not in ("float32", "float16", "int8"):
        raise BundleError(f"{raw['name']!r}: dtype {raw['dtype']!r} is none of float32, float16, int8")
    return Tensor(str(raw["name"]), shape, str(raw["dtype"]))


def read_input(raw: Mapping[str, Any]) -> Input:
    kind, name = raw["kind"], str(raw["name"])
    if kind == "image":
        return _image(raw, name)
    if kind == "landmarks":
        if raw["order"] not in _LANDMARK_COUNTS:
            raise BundleError(f"input {name!r}: order {raw['order']!r} is none of {', '.join(_LANDMARK_COUNTS)}")
        landmarks = LandmarkInput(name, raw["order"])
        if tuple(raw["shape"]) != landmarks.graph_inputs[0].shape or raw["dtype"] != "float32":
            raise BundleError(
                f"input {name!r}: {raw['order']} is float32 (batch, {landmarks.count}, 2), "
                f"found {raw['dtype']} {tuple(raw['shape'])}"
            )
        return landmarks
    if kind == "audio":
        return _audio(raw, name)
    raise BundleError(f"input {name!r}: kind {kind!r} is none of image, landmarks, audio")


def _image(raw: Mapping[str, Any], name: str) -> ImageInput:
    if raw["colour"] != "rgb" or raw["align"] not in _ALIGNMENTS:
        raise BundleError(
            f"input {name!r}: this release feeds RGB aligned by {' or '.join(_ALIGNMENTS)}; "
            f"found {raw['colour']} aligned by {raw['align']}"
        )
    shape = tuple(raw["shape"])
    if len(shape) != 4 or shape[:2] != ("batch", 3) or shape[2] != shape[3] or raw["dtype"] != "float32":
        raise BundleError(f"input {name!r}: expected float32 (batch, 3, side, side), found {raw['dtype']} {shape}")
    std = tuple(float(v) for v in raw["std"])
    mean = tuple(float(v) for v in raw["mean"])
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise BundleError(f"input {name!r}: mean {mean} and std {std} need three numbers each, std above 0")
    growth = float(raw.get("growth", 0.0))
    if not 0.0 <= growth <= 2.0:
        raise BundleError(f"input {name!r}: growth is a fraction of the face box in [0, 2], found {growth}")
    filters = tuple(
        Filter(str(f["name"]), {k: float(v) for k, v in f.items() if k != "name"}) for f in raw.get("filters", ())
    )
    for given in filters:
        try:
            check_settings(given.name, given.settings)
        except InputError as error:
            raise BundleError(f"input {name!r}: {error}") from None
    return ImageInput(name, int(shape[2]), mean, std, str(raw["align"]), growth, filters)


def _audio(raw: Mapping[str, Any], name: str) -> AudioInput:
    mel = None if raw.get("log_mel") is None else LogMel(**raw["log_mel"])
    audio = AudioInput(
        name,
        int(raw["rate_hz"]),
        int(raw["window"]),
        int(raw["hop"]),
        bool(raw["optional"]),
        bool(raw["waveform"]),
        mel,
    )
    if audio.rate_hz < 1 or not 1 <= audio.hop <= audio.window:
        raise BundleError(
            f"input {name!r}: needs rate_hz above 0 and 1 <= hop <= window; "
            f"found rate_hz {audio.rate_hz}, hop {audio.hop}, window {audio.window}"
        )
    if mel is None and not audio.waveform:
        raise BundleError(f"input {name!r}: neither waveform nor log_mel, so no graph would hear it")
    if mel is not None:
        fits = 1 <= mel.frame <= min(mel.fft, audio.window) and mel.hop >= 1 and mel.bins >= 1 and mel.std > 0
        if not (fits and 0 <= mel.low_hz < mel.high_hz <= audio.rate_hz / 2):
            raise BundleError(f"input {name!r}: its log-mel settings make no sense at {audio.rate_hz} Hz: {mel}")
    return audio


def read_state(raw: Mapping[str, Any]) -> StateTensor:
    tensor, kept_by = read_tensor(raw), raw.get("kept_by", "graph")
    if kept_by not in ("graph", "runtime"):
        raise BundleError(f"state {tensor.name!r}: kept_by {kept_by!r} is neither graph nor runtime")
    return StateTensor(tensor.name, tensor.shape, tensor.dtype, float(raw["init"]), kept_by)


def read_output(raw: Mapping[str, Any]) -> Output:
    if raw["kind"] not in _KINDS:
        raise BundleError(f"output {raw['name']!r}: kind {raw['kind']!r} is none of {', '.join(_KINDS)}")
    low, high = raw["range"]
    labels = tuple(str(label) for label in raw.get("labels", ()))
    if raw["kind"] != "regression" and not labels:
        raise BundleError(f"output {raw['name']!r}: kind {raw['kind']} needs labels")
    smoothing = raw.get("smoothing_s")
    if smoothing is not None and not float(smoothing) > 0:
        raise BundleError(f"output {raw['name']!r}: smoothing_s is {smoothing}, expected above 0")
    return Output(
        str(raw["name"]),
        str(raw["kind"]),
        (float(low), float(high)),
        labels,
        str(raw["signal"]),
        None if smoothing is None else float(smoothing),
    )
