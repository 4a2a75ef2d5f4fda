"""Outputs are paired by name, kind and label, and what cannot be paired says what both sides have."""

import numpy as np
import pytest

from affect_export.recipes.distill.mapping import match_outputs, parse_map
from affect_runtimes.errors import InputError
from affect_runtimes.interface import Output

EXPRESSION = Output("expression", "distribution", (0, 1), ("neutral", "happiness", "anger", "fear"))
VALENCE = Output("valence", "regression", (-1, 1))
AROUSAL = Output("arousal", "regression", (-1, 1))
UNITS = Output("action_units", "multilabel", (0, 1), ("AU1", "AU2", "AU4"))
STUDENT = (EXPRESSION, VALENCE, AROUSAL, UNITS)


def test_labels_are_matched_by_name_whatever_their_order() -> None:
    teacher = Output("expression", "distribution", (0, 1), ("Fear", "sadness", "Neutral", "anger"))
    (match,) = match_outputs([teacher], STUDENT)
    assert match.student_columns == (0, 2, 3) and match.teacher_columns == (2, 3, 0)
    said = np.array([[0.1, 0.5, 0.3, 0.1], [0.01, 0.98, 0.005, 0.005]], np.float32)
    targets, known = match.targets(said)
    np.testing.assert_allclose(targets[0], [0.6, 0.2, 0.2], rtol=1e-5)
    # A row counts as much as the teacher gives to what both know; next to nothing is nothing.
    np.testing.assert_allclose(known, [0.5, 0.0], rtol=1e-5)
    assert match.to_json() == {
        "teacher": "expression[Neutral, anger, Fear]",
        "student": "expression[neutral, anger, fear]",
    }


def test_equal_outputs_are_taken_as_they_are() -> None:
    matches = match_outputs(STUDENT, STUDENT)
    assert [m.student.name for m in matches] == ["expression", "valence", "arousal", "action_units"]
    assert all(m.teacher_columns is None and m.student_columns is None for m in matches)
    said = np.random.default_rng(0).random((5, 3)).astype(np.float32)
    targets, known = matches[3].targets(said)
    np.testing.assert_array_equal(targets, said)
    np.testing.assert_array_equal(known, 1)


def test_one_output_of_two_columns_teaches_two_outputs_in_their_range() -> None:
    teacher = Output("position", "regression", (0, 10), ("arousal", "dominance", "valence"))
    matches = {m.student.name: m for m in match_outputs([teacher], STUDENT)}
    assert set(matches) == {"valence", "arousal"}
    said = np.array([[0.0, 3.0, 10.0], [5.0, 3.0, 2.5]], np.float32)
    np.testing.assert_allclose(matches["valence"].targets(said)[0], [1.0, -0.5], atol=1e-6)
    np.testing.assert_allclose(matches["arousal"].targets(said)[0], [-1.0, 0.0], atol=1e-6)


def test_a_map_pairs_what_is_called_differently() -> None:
    teacher = [
        Output("emotion", "distribution", (0, 1), ("anger", "happiness")),
        Output("pleasure", "regression", (0, 1)),
        Output("va", "regression", (-1, 1), ("v", "a")),
    ]
    asked = parse_map(["emotion=expression", "pleasure=valence", "va.a=arousal"])
    matches = {m.student.name: m for m in match_outputs(teacher, STUDENT, asked)}
    assert list(matches) == ["expression", "valence", "arousal"]
    assert matches["expression"].student_columns == (1, 2)
    np.testing.assert_allclose(matches["valence"].targets(np.array([0.0, 0.75]))[0], [-1.0, 0.5])
    np.testing.assert_allclose(matches["arousal"].targets(np.array([[0.1, 0.2]]))[0], [0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("teacher", "asked", "words"),
    [
        (
            (Output("quadrant", "distribution", (0, 1), ("a", "b")),),
            {},
            ["share no output", "quadrant", "action_units"],
        ),
        ((Output("valence", "distribution", (0, 1), ("a", "b")),), {}, ["share no output"]),
        ((Output("expression", "distribution", (0, 1), ("neutral", "b")),), {}, ["share no output", "neutral b"]),
        ((VALENCE,), {"joy": "valence"}, ["no output joy", "expression (distribution: neutral"]),
        ((VALENCE,), {"arousal": "a"}, ["the teacher has no output a", "valence (regression)"]),
        ((EXPRESSION,), {"valence": "expression"}, ["a distribution cannot teach a regression"]),
        ((Output("va", "regression", (-1, 1), ("v", "a")),), {"valence": "va"}, ["va.LABEL=valence", "labels v, a"]),
        ((Output("e", "distribution", (0, 1), ("x", "y")),), {"expression": "e"}, ["too few labels", "x y"]),
    ],
)
def test_what_cannot_be_paired_is_told(teacher: tuple[Output, ...], asked: dict[str, str], words: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        match_outputs(teacher, STUDENT, asked)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("words", [["valence"], ["=a"], ["a="], ["a=valence", "b=valence"]])
def test_a_map_of_another_form_is_refused(words: list[str]) -> None:
    with pytest.raises(InputError, match="--map"):
        parse_map(words)
