"""MediaPipe's Face Landmarker on video: 478 landmarks and 52 blendshapes, but no expression.

The argument after the job is its file.
"""

import sys

from harness import Peer, Picture, serve


class Landmarker:
    """mediapipe.tasks.vision.FaceLandmarker in its mode for video, which follows a face once it is found."""

    bgr = False

    def __init__(self, path: str) -> None:
        import mediapipe  # type: ignore[import-not-found]
        from mediapipe.tasks.python import BaseOptions, vision  # type: ignore[import-not-found]

        self._image, self._format = mediapipe.Image, mediapipe.ImageFormat.SRGB
        self._landmarker = vision.FaceLandmarker.create_from_options(
            vision.FaceLandmarkerOptions(
                base_options=BaseOptions(model_asset_path=path),
                running_mode=vision.RunningMode.VIDEO,
                output_face_blendshapes=True,
            )
        )

    def reset(self) -> None:
        """Its own tracking notices the cut."""

    def frame(self, picture: Picture, timestamp_s: float) -> int:
        """See `Peer`."""
        image = self._image(image_format=self._format, data=picture)
        return len(self._landmarker.detect_for_video(image, int(timestamp_s * 1000)).face_blendshapes)

    def face(self, picture: Picture) -> str | None:
        """It names no expression."""
        return None


def _make() -> Peer:
    return Landmarker(sys.argv[2])


serve(_make, faces=False)
