"""What a model takes, gives and carries: the part of a manifest that a model states about itself.

Each class writes itself with `to_json`; the `read_` functions check what they are given and say what is wrong. How
the parts of one manifest fit together is checked in `affect_runtimes.manifest`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from affect_runtimes._checked import Fields, shown
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
_KINDS = ("regression", "distribution", "multilabel", "faces", "points")
_ARRAYS = {"faces": (15,), "points": (2,)}
"""Kinds that are tables: their last axes. "faces": proposals of a detector, score, box (x, y, width, height) and five
points (x, y) a row, in fractions of the picture; "points": (x, y) a row, in fractions of the crop."""
_ALIGNMENTS = ("eyes", "box", "points", "picture")
_LANDMARK_COUNTS = {"ibug-68": 68}
_LARGEST_VALUE = {"float32": 3.4e38, "float16": 65504.0, "int8": 127.0}

# Far beyond what any model here takes, and small enough that a made-up size cannot fill a device's memory.
_MOST_PX = 8192
_MOST_SAMPLES = 2**24
_MOST_RATE_HZ = 1_000_000
_MOST_FFT = 2**16
_MOST_BINS = 1024
_MOST_ROWS = 2**20
_MOST_SPECTRUM_BYTES = 2**30
_LEAST_STD, _MOST_SCALE = 1e-6, 1e6
_LEAST_S, _MOST_S = 1e-6, 86_400.0


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

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}


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
        align: "eyes" (eye centres at fixed places, `preprocess.align_face`), "box" (the upright face box), "points"
            (five points near fixed places, `preprocess.align_points`), or "picture" (no face, but the whole picture,
            `preprocess.letterbox`).
        growth: for "box": added to each side of the detector's box, as a fraction of the box; for "points": added to
            each side of the usual crop, likewise.
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
            **({"growth": self.growth} if self.align in ("box", "points") else {}),
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
        kind: regression, distribution (a label an entry, sums to 1), multilabel (each entry in its range), or what only
            finds faces and says nothing of them: faces or points, a table of so many rows.
        range: lowest and highest value.
        labels: of the entries; empty for a single regression value.
        signal: what it was taught from: "label", or the word for a substitute, such as "proxy".
        smoothing_s: time constant in seconds of the filter that a stream lays over the output; None for none.
        shape: of one stream's table, for the kinds faces (rows, 15) and points (rows, 2); else ().
    """

    name: str
    kind: str
    range: tuple[float, float]
    labels: tuple[str, ...] = ()
    signal: str = "label"
    smoothing_s: float | None = None
    shape: tuple[int, ...] = ()

    @property
    def tensor(self) -> Tensor:
        """(batch,) for a single value, (batch, rows, columns) for a table, else (batch, labels)."""
        if self.shape:
            return Tensor(self.name, ("batch", *self.shape), "float32")
        return Tensor(self.name, ("batch", len(self.labels)) if self.labels else ("batch",), "float32")

    def to_json(self) -> dict[str, Any]:
        low, high = (int(v) if v == int(v) else v for v in self.range)
        return {
            "name": self.name,
            "kind": self.kind,
            "range": [low, high],
            **({"labels": list(self.labels)} if self.labels else {}),
            **({"shape": list(self.shape)} if self.shape else {}),
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
        return {**super().to_json(), "init": self.initial, **kept}


def read_tensor(raw: Any) -> Tensor:
    return _tensor(Fields(raw, "a tensor"), "tensor")


def read_input(raw: Any) -> Input:
    fields = Fields(raw, "an input")
    fields.where = f"input {fields.name()!r}"
    kind = fields.choice("kind", ("image", "landmarks", "audio"))
    if kind == "image":
        return _image(fields)
    return _landmarks(fields) if kind == "landmarks" else _audio(fields)


def read_state(raw: Any) -> StateTensor:
    fields = Fields(raw, "a state")
    tensor = _tensor(fields, "state")
    largest = _LARGEST_VALUE[tensor.dtype]
    initial = fields.number("init", -largest, largest)
    if tensor.dtype == "int8" and initial != int(initial):
        fields.refuse("init", "a whole number, as the dtype is int8")
    kept_by = fields.choice("kept_by", ("graph", "runtime")) if "kept_by" in fields.raw else "graph"
    return StateTensor(tensor.name, tensor.shape, tensor.dtype, initial, kept_by)


def read_output(raw: Any) -> Output:
    fields = Fields(raw, "an output")
    fields.where = f"output {fields.name()!r}"
    kind = fields.choice("kind", _KINDS)
    low, high = fields.numbers("range", 2)
    if not low < high:
        fields.refuse("range", "the lowest value, then the highest")
    labels = fields.texts("labels") if "labels" in fields.raw else ()
    if kind in ("distribution", "multilabel") and not labels:
        fields.refuse("labels", f"at least one for the kind {kind}")
    shape: tuple[int, ...] = ()
    if kind in _ARRAYS:
        if labels:
            fields.refuse("labels", f"none for the kind {kind}")
        shape = _table(fields, _ARRAYS[kind])
    elif "shape" in fields.raw:
        fields.refuse("shape", f"none for the kind {kind}")
    if len(set(labels)) != len(labels):
        fields.refuse("labels", "no label twice")
    smoothing = fields.number("smoothing_s", _LEAST_S, _MOST_S) if fields.given("smoothing_s") else None
    return Output(fields.name(), kind, (low, high), labels, fields.text("signal"), smoothing, shape)


def _table(fields: Fields, columns: tuple[int, ...]) -> tuple[int, ...]:
    shape = fields.raw.get("shape")
    rows = shape[0] if isinstance(shape, list) and shape else None
    if type(rows) is not int or not 1 <= rows <= _MOST_ROWS or shape != [rows, *columns]:
        fields.refuse("shape", f"[rows, {', '.join(map(str, columns))}] with 1 to {_MOST_ROWS} rows")
    return (rows, *columns)


def _tensor(fields: Fields, what: str) -> Tensor:
    fields.where = f"{what} {fields.name()!r}"
    shape = fields.raw.get("shape")
    sizes = [d for d in shape if d != "batch"] if isinstance(shape, list) else []
    if (
        not isinstance(shape, list)
        or len(sizes) != len(shape) - 1
        or any(type(d) is not int or not 1 <= d < 2**63 for d in sizes)
    ):
        fields.refuse("shape", "a list with exactly one 'batch' and otherwise positive sizes")
    return Tensor(fields.name(), tuple(shape), fields.choice("dtype", tuple(_LARGEST_VALUE)))


def _image(fields: Fields) -> ImageInput:
    fields.choice("colour", ("rgb",))
    align = fields.choice("align", _ALIGNMENTS)
    shape = _tensor(fields, "input").shape
    size = shape[-1]
    if shape != ("batch", 3, size, size) or not isinstance(size, int) or size > _MOST_PX:
        fields.refuse("shape", f"['batch', 3, side, side] with a side of 1 to {_MOST_PX} pixels")
    fields.choice("dtype", ("float32",))
    filters = []
    for each in fields.objects("filters") if "filters" in fields.raw else ():
        given = Filter(each.text("name"), {key: each.number(key) for key in each.raw if key != "name"})
        try:
            check_settings(given.name, given.settings)
        except InputError as error:
            raise BundleError(f"{fields.where}: {error}") from None
        filters.append(given)
    return ImageInput(
        fields.name(),
        size,
        mean=fields.numbers("mean", 3, -_MOST_SCALE, _MOST_SCALE),
        std=fields.numbers("std", 3, _LEAST_STD, _MOST_SCALE),
        align=align,
        growth=fields.number("growth", 0.0, 2.0) if "growth" in fields.raw else 0.0,
        filters=tuple(filters),
    )


def _landmarks(fields: Fields) -> LandmarkInput:
    landmarks = LandmarkInput(fields.name(), fields.choice("order", tuple(_LANDMARK_COUNTS)))
    tensor, wanted = _tensor(fields, "input"), landmarks.graph_inputs[0]
    if tensor != wanted:
        raise BundleError(
            f"{fields.where}: {landmarks.order} is {wanted.dtype} {list(wanted.shape)}, "
            f"found {tensor.dtype} {list(tensor.shape)}"
        )
    return landmarks


def _audio(fields: Fields) -> AudioInput:
    rate_hz = fields.whole("rate_hz", 1, _MOST_RATE_HZ)
    window = fields.whole("window", 1, _MOST_SAMPLES)
    audio = AudioInput(
        fields.name(),
        rate_hz,
        window,
        hop=fields.whole("hop", 1, window),
        optional=fields.flag("optional"),
        waveform=fields.flag("waveform"),
        log_mel=_log_mel(fields.object("log_mel"), rate_hz, window) if fields.given("log_mel") else None,
    )
    if audio.log_mel is None and not audio.waveform:
        raise BundleError(f"{fields.where}: neither waveform nor log_mel, so no graph would hear it")
    return audio


def _log_mel(fields: Fields, rate_hz: int, window: int) -> LogMel:
    unknown = set(fields.raw) - set(LogMel.__dataclass_fields__)
    if unknown:
        raise BundleError(f"{fields.where}: this release knows no {shown(sorted(unknown))}")
    fft = fields.whole("fft", 1, _MOST_FFT)
    low_hz = fields.number("low_hz", 0.0, rate_hz / 2)
    mel = LogMel(
        bins=fields.whole("bins", 1, _MOST_BINS),
        frame=fields.whole("frame", 1, min(fft, window)),
        hop=fields.whole("hop", 1, window),
        fft=fft,
        low_hz=low_hz,
        high_hz=fields.number("high_hz", low_hz, rate_hz / 2),
        mean=fields.number("mean", -_MOST_SCALE, _MOST_SCALE),
        std=fields.number("std", _LEAST_STD, _MOST_SCALE),
    )
    if mel.low_hz == mel.high_hz:
        fields.refuse("high_hz", f"more than low_hz, {low_hz:g}")
    taken = 8 * mel.fft * mel.frames(window)  # float64, as `affect_runtimes.mel` computes
    if taken > _MOST_SPECTRUM_BYTES:
        fields.refuse("hop", f"one that keeps a step's spectrum within {_MOST_SPECTRUM_BYTES} bytes, not {taken}")
    return mel
