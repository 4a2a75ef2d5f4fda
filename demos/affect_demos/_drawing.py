"""The annotated video: the picture with its face boxes, and a panel that explains the face in front."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from affect_demos._changes import LEAST_EYES_S, in_front
from affect_edge import Affect

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

__all__ = ["Annotator"]

Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

# Of Okabe and Ito's palette, told apart with any colour vision; the background is dark, so the light ones.
_SKY: Colour = (86, 180, 233)
_ORANGE: Colour = (230, 159, 0)
_GREEN: Colour = (0, 178, 132)
_BACK: Colour = (18, 22, 30)
_CARD: Colour = (30, 36, 47)
_RULE: Colour = (58, 66, 80)
_DIM: Colour = (150, 160, 175)
_BRIGHT: Colour = (238, 241, 245)
_WARN: Colour = (240, 228, 66)

_PANEL_PX = 360
_LEAST_HEIGHT_PX = 576
_EDGE_PX = 16
_TRACE_S = 6.0


class Annotator:
    """Draws frames of one video, in order; it remembers the last seconds for the traces.

    Args:
        frame_size: (width, height) of the frames in pixels. Small pictures are enlarged by a whole factor to at least
            640 pixels width, and wide ones reduced to 1280, so that text is readable in proportion.
        heading: a line at the top of the panel.
        warning: a line that must not be missed, such as that the weights are random; empty for none.
    """

    def __init__(self, frame_size: tuple[int, int], heading: str, warning: str = "") -> None:
        width, height = frame_size
        self._zoom = float(-(-640 // width)) if width < 640 else min(1.0, 1280 / width)
        self._picture = (round(width * self._zoom), round(height * self._zoom))
        # Video codecs want even sides.
        tall = max(self._picture[1], _LEAST_HEIGHT_PX)
        self.size = ((self._picture[0] + _PANEL_PX + 1) // 2 * 2, (tall + 1) // 2 * 2)
        self._offset_y = (self.size[1] - self._picture[1]) // 2
        self._heading, self._warning = heading, warning
        self._past: defaultdict[int | None, deque[tuple[float, float | None, float | None, bool]]] = defaultdict(deque)
        self._main: int | None = None
        self._fonts: dict[tuple[int, bool], Any] = {}

    def draw(
        self,
        frame: Picture,
        affects: Sequence[Affect],
        seconds: dict[str, float],
        timestamp_s: float,
        *,
        perclos: Mapping[int | None, float] | None = None,
        observed_s: Mapping[int | None, float] | None = None,
        picture: bool = True,
    ) -> Picture:
        """One annotated frame.

        Args:
            frame: (H, W, 3) uint8, RGB.
            affects: the faces of this frame.
            seconds: stage -> how long it took.
            timestamp_s: time of the frame.
            perclos: track_id -> share, for faces of which enough was seen.
            observed_s: track_id -> seconds in which its eyes were seen, to say how much is missing.
            picture: False where no new picture came and `frame` is the last one.

        Returns:
            (height, width, 3) uint8, RGB, of `size`.
        """
        import cv2
        from PIL import Image, ImageDraw

        for affect in affects:
            past = self._past[affect.track_id]
            past.append((timestamp_s, affect.valence, affect.arousal, affect.held))
            while past[0][0] < timestamp_s - _TRACE_S:
                past.popleft()
        kept = {a.track_id for a in affects}
        self._past = defaultdict(
            deque, {k: v for k, v in self._past.items() if k in kept or v[-1][0] > timestamp_s - 1}
        )
        canvas = np.empty((self.size[1], self.size[0], 3), np.uint8)
        canvas[:] = _BACK
        way = cv2.INTER_CUBIC if self._zoom > 1 else cv2.INTER_AREA
        top, (width, height) = self._offset_y, self._picture
        shown = cv2.resize(frame, self._picture, interpolation=way)
        canvas[top : top + height, :width] = shown if picture else shown // 2
        main = in_front(affects, self._main)
        self._main = self._main if main is None else main.track_id
        for affect in affects:
            self._box(canvas, affect, self._colour(affect, main))
        image = Image.fromarray(canvas)
        pen = ImageDraw.Draw(image)
        for affect in affects:
            self._label(pen, affect, self._colour(affect, main))
        if not picture:
            pen.text((width // 2, top + height // 2), "no new picture", _WARN, self._font(22, bold=True), anchor="mm")
        share = None if main is None else (perclos or {}).get(main.track_id)
        seen_s = 0.0 if main is None else (observed_s or {}).get(main.track_id, 0.0)
        trace = self._panel(pen, main, seconds, timestamp_s, share, seen_s)
        finished = np.array(image, np.uint8)
        if main is not None:
            self._trace(finished, trace, main.track_id, timestamp_s)
        return finished

    @staticmethod
    def _colour(affect: Affect, main: Affect | None) -> Colour:
        return _SKY if affect is main and not affect.held else _DIM

    def _corners(self, affect: Affect) -> tuple[int, int, int, int]:
        """The face box on the canvas, kept inside the picture: x0, y0, x1, y1."""
        x, y, width, height = (side * self._zoom for side in affect.box or (0.0, 0.0, 0.0, 0.0))
        right, bottom = self._picture[0] - 2, self._picture[1] - 2
        x0, x1 = (int(np.clip(v, 1, right)) for v in (x, x + width))
        y0, y1 = (int(np.clip(v, 1, bottom)) + self._offset_y for v in (y, y + height))
        return x0, y0, x1, y1

    def _box(self, canvas: Picture, affect: Affect, colour: Colour) -> None:
        import cv2

        x0, y0, x1, y1 = self._corners(affect)
        # Corner brackets: a whole rectangle would hide more of the face.
        arm = max(6, (x1 - x0) // 5)
        for x, y, dx, dy in ((x0, y0, arm, arm), (x1, y0, -arm, arm), (x0, y1, arm, -arm), (x1, y1, -arm, -arm)):
            bracket = np.array([(x + dx, y), (x, y), (x, y + dy)], np.int32)
            if affect.held:
                _dashes(canvas, bracket, colour)
            else:
                cv2.polylines(canvas, [bracket], False, colour, 3, cv2.LINE_AA)
        for x, y in affect.landmarks[:2] if affect.landmarks is not None else ():
            centre = (int((x + 0.5) * self._zoom), int((y + 0.5) * self._zoom) + self._offset_y)
            cv2.circle(canvas, centre, 3, colour, -1, cv2.LINE_AA)

    def _label(self, pen: "ImageDraw", affect: Affect, colour: Colour) -> None:
        x0, y0, _, y1 = self._corners(affect)
        text = f"face {affect.track_id}" + ("   held" if affect.held else "")
        if affect.expression and affect.expression_probabilities:
            text += f"   {affect.expression} {affect.expression_probabilities[affect.expression]:.0%}"
        font = self._font(15, bold=True)
        width = int(pen.textlength(text, font)) + 16
        x0 = min(max(0, x0), max(0, self._picture[0] - width))
        above = y0 - 30 >= self._offset_y
        y = y0 - 30 if above else min(y1 + 6, self._offset_y + self._picture[1] - 24)
        pen.rounded_rectangle((x0, y, x0 + width, y + 24), 5, fill=colour)
        pen.text((x0 + 8, y + 12), text, _BACK, font, anchor="lm")

    def _panel(
        self,
        pen: "ImageDraw",
        main: Affect | None,
        seconds: dict[str, float],
        timestamp_s: float,
        perclos: float | None,
        observed_s: float,
    ) -> tuple[int, int, int, int]:
        """The panel's text and bars; returns where the valence/arousal trace goes: x0, y0, x1, y1."""
        left, right = self._picture[0] + _EDGE_PX, self.size[0] - _EDGE_PX
        pen.text((left, 22), "Affect Edge", _BRIGHT, self._font(18, bold=True), anchor="lm")
        pen.text((right, 22), _clock(timestamp_s), _DIM, self._font(14), anchor="rm")
        pen.text(
            (left, 44), self._warning or self._heading, _WARN if self._warning else _DIM, self._font(12), anchor="lm"
        )
        y = self._expressions(pen, main, left, right, 62)
        pen.text((left, y), "valence", _SKY, self._font(13, bold=True), anchor="lm")
        pen.text((left + 132, y), "arousal", _ORANGE, self._font(13, bold=True), anchor="lm")
        for x, value, colour in (
            (left + 64, main and main.valence, _SKY),
            (left + 196, main and main.arousal, _ORANGE),
        ):
            pen.text((x, y), "-" if value is None else f"{value:+.2f}", colour, self._font(13), anchor="lm")
        pen.text((right, y), "proxy", _DIM, self._font(11), anchor="rm")
        trace = (left, y + 14, right, y + 96)
        pen.rounded_rectangle(trace, 6, fill=_CARD)
        middle = (trace[1] + trace[3]) // 2
        pen.line((left + 6, middle, right - 6, middle), _RULE)
        for label, at in (("+1", trace[1] + 9), ("-1", trace[3] - 9)):
            pen.text((left + 6, at), label, _DIM, self._font(10), anchor="lm")
        y = trace[3] + 22
        closure = None if main is None else main.eye_closure
        green = _DIM if main is not None and main.held else _GREEN
        pen.text((left, y), "eye closure", _GREEN, self._font(13, bold=True), anchor="lm")
        pen.text((right, y), "-" if closure is None else f"{closure:.2f}", green, self._font(13), anchor="rm")
        self._bar(pen, (left, y + 13, right, y + 27), closure, green)
        pen.text((left, y + 35), "open", _DIM, self._font(10), anchor="lm")
        pen.text((right, y + 35), "shut", _DIM, self._font(10), anchor="rm")
        pen.text((left, y + 54), "PERCLOS", _BRIGHT, self._font(13, bold=True), anchor="lm")
        pen.text((left + 74, y + 54), "last minute", _DIM, self._font(11), anchor="lm")
        # Right of it the share, or how much of the eyes has been seen of what is needed to say one.
        said = (
            f"{perclos:.0%}"
            if perclos is not None
            else "-"
            if main is None
            else f"{observed_s:.0f} s of {LEAST_EYES_S:.0f} s seen"
        )
        pen.text((right, y + 54), said, _BRIGHT, self._font(13, bold=perclos is not None), anchor="rm")
        self._latency(pen, seconds, left, right, y + 80)
        return trace

    def _expressions(self, pen: "ImageDraw", main: Affect | None, left: int, right: int, y: int) -> int:
        """A row for each expression, in the model's order; returns the next free y."""
        pen.rounded_rectangle((left, y, right, y + 208), 6, fill=_CARD)
        if main is None or not main.expression_probabilities:
            text = "no face in this frame" if main is None else "this model names no expression"
            pen.text(((left + right) // 2, y + 104), text, _DIM, self._font(16), anchor="mm")
            return y + 230
        title = main.expression or ""
        bright = _DIM if main.held else _BRIGHT
        font = self._font(22, bold=True)
        pen.text((left + 12, y + 22), title, bright, font, anchor="lm")
        if main.held:
            beside = left + 20 + int(pen.textlength(title, font))
            pen.text((beside, y + 24), "held", _WARN, self._font(13), anchor="lm")
        probability = main.expression_probabilities[title]
        pen.text((right - 12, y + 22), f"{probability:.0%}", bright, self._font(22, bold=True), anchor="rm")
        rows = list(main.expression_probabilities.items())[:8]
        for i, (label, share) in enumerate(rows):
            row = y + 54 + i * 19
            colour = _SKY if label == title and not main.held else _DIM
            pen.text((left + 12, row), label, _BRIGHT if label == title else _DIM, self._font(12), anchor="lm")
            self._bar(pen, (left + 100, row - 5, right - 12, row + 5), share, colour)
        return y + 230

    def _latency(self, pen: "ImageDraw", seconds: dict[str, float], left: int, right: int, y: int) -> None:
        pen.line((left, y - 12, right, y - 12), _RULE)
        if "total" in seconds:
            pen.text((left, y + 6), f"{seconds['total'] * 1e3:.1f} ms", _BRIGHT, self._font(16, bold=True), anchor="lm")
            pen.text((left + 84, y + 7), "this frame", _DIM, self._font(12), anchor="lm")
        parts = [f"{stage} {seconds[stage] * 1e3:.1f}" for stage in ("detect", "encode", "step") if stage in seconds]
        pen.text((left, y + 28), "   ".join(parts), _DIM, self._font(12), anchor="lm")
        note = "An estimate of what the face shows:"
        pen.text((left, self.size[1] - 34), note, _DIM, self._font(11), anchor="lm")
        note = "not a feeling, a diagnosis, or evidence."
        pen.text((left, self.size[1] - 18), note, _DIM, self._font(11), anchor="lm")

    def _trace(
        self, canvas: Picture, area: tuple[int, int, int, int], track_id: int | None, timestamp_s: float
    ) -> None:
        """Valence and arousal of the last seconds, now at the right edge."""
        import cv2

        x0, y0, x1, y1 = area[0] + 24, area[1] + 6, area[2] - 8, area[3] - 6
        # In 1/16 pixels, so that a slow line does not climb in stairs.
        for which, colour in ((2, _ORANGE), (1, _SKY)):
            points = [
                (
                    x1 - (timestamp_s - past[0]) / _TRACE_S * (x1 - x0),
                    (y0 + y1) / 2 - np.clip(value, -1, 1) * (y1 - y0) / 2,
                    past[3],
                )
                for past in self._past[track_id]
                if (value := past[which]) is not None
            ]
            for held, run in groupby(pairwise(points), key=lambda pair: pair[1][2]):
                pairs = list(run)
                line = np.round(np.array([pairs[0][0][:2], *(end[:2] for _, end in pairs)]) * 16).astype(np.int32)
                # What is only held is grey: nobody measured it.
                cv2.polylines(canvas, [line], False, _DIM if held else colour, 1 if held else 2, cv2.LINE_AA, shift=4)
            if points:
                x, y = (round(float(v) * 16) for v in points[-1][:2])
                now = _DIM if points[-1][2] else colour
                cv2.circle(canvas, (x, y), 4 * 16, now, -1, cv2.LINE_AA, shift=4)

    @staticmethod
    def _bar(pen: "ImageDraw", area: tuple[int, int, int, int], share: float | None, colour: Colour) -> None:
        x0, y0, x1, y1 = area
        pen.rounded_rectangle(area, 3, fill=_RULE)
        filled = round((x1 - x0) * min(1.0, max(0.0, share or 0.0)))
        if filled >= 2:
            pen.rounded_rectangle((x0, y0, x0 + filled, y1), min(3, filled // 2), fill=colour)

    def _font(self, size: int, bold: bool = False) -> Any:
        """DejaVu Sans, which matplotlib carries, so that every machine draws the same."""
        if (size, bold) not in self._fonts:
            import matplotlib
            from PIL import ImageFont

            name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
            path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
            self._fonts[size, bold] = ImageFont.truetype(str(path), size)
        return self._fonts[size, bold]


def _dashes(canvas: Picture, corners: NDArray[np.int32], colour: Colour) -> None:
    """A dashed line through the corners."""
    import cv2

    for start, end in zip(corners[:-1].astype(float), corners[1:].astype(float), strict=True):
        length = float(np.hypot(*(end - start)))
        for at in np.arange(0.0, length, 8.0):
            a, b = (start + (end - start) * min(s, length) / max(length, 1.0) for s in (at, at + 4.0))
            cv2.line(canvas, (round(a[0]), round(a[1])), (round(b[0]), round(b[1])), colour, 2, cv2.LINE_AA)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0.0, seconds), 60.0)
    return f"{int(minutes):02d}:{rest:06.3f}"
