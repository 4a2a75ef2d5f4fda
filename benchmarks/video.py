"""The recurrent student in video, beside filters of its own frame-wise word, leaving one recording out at a time.

    python benchmarks/video.py --ferplus F --faces F --clips F --detector F --run RUN --output DIR

RUN is a run of affect-train-student: its encoder is taken as it was after the image stage, which saw no clip. Prints
the means over recordings and leaves every figure in `video.json`. `recipes.video` says what is compared.
"""

import argparse
import json
import logging
from pathlib import Path

import torch

from affect_export.models.student import Student, StudentConfig
from affect_export.recipes import sequences, student, video


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    student.add_source_arguments(parser)
    parser.add_argument("--run", type=Path, required=True, help="output of affect-train-student")
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sources, recipe = student.open_sources(a), student.Recipe()
    model = Student(StudentConfig())
    model.load_state_dict(torch.load(a.run / "images" / "last.pt", weights_only=True)["best"])
    model.eval()
    lessons = student.lessons_of(sources, recipe)
    stills = sequences.encode_stills(model, lessons, recipe.seed)
    clips = sequences.encode_clips(model, lessons, recipe.seed)
    found = video.leave_one_out(model, stills, clips, a.output, recipe.sequence_epochs)
    told = video.summary(found, video.columns(model))
    (a.output / "video.json").write_text(json.dumps(told, indent=1) + "\n")
    print(f"{sum(len(c.ok) for c in clips)} frames of {len(clips)} clips from {told['means'][0]['sources']} recordings")
    print("| every n-th frame | output | " + " | ".join(video.FOLLOWERS) + " | recurrent leads linear by (95 %) |")
    print("|---" * (len(video.FOLLOWERS) + 3) + "|")
    for row in told["means"]:
        values = " | ".join(f"{row['ccc'][f]:.3f}" for f in video.FOLLOWERS)
        mean, low, high = row["lead"]["linear"]
        print(f"| {row['stride']} | {row['output']} | {values} | {mean:+.3f} ({low:+.3f} to {high:+.3f}) |")
    for row in told["means"]:
        if "lag" in row:
            lags = ", ".join(f"{f} {lag['median']:.1f} of {lag['onsets']:.0f}" for f, lag in row["lag"].items())
            print(
                f"every {row['stride']}. frame: median lag in frames at an onset of valence, of how many onsets: {lags}"
            )


if __name__ == "__main__":
    main()
