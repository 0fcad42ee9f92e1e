"""Scorers of written answers, on hand-made answers and figures that others have published."""

import math
import random

import pytest

from perdure.errors import BadInput
from perdure.evaluation import scorers
from perdure.evaluation.scorers import SCORERS


@pytest.mark.parametrize(
    ("name", "written", "expected", "score"),
    [
        ("exact_match", " B\n", "B", 1),
        ("exact_match", "B.", "B", 0),
        ("exact_match", "", "B", 0),
        ("prefix", "B. hawkish", "B", 1),
        ("prefix", "b", "B", 0),
        ("prefix", "Sci", "Science", 0),  # half an answer is none
        ("prefix", "anything", "", 0),
        ("first_character", "C\nBecause an allusion is", "C\nAn allusion is", 1),
        ("first_character", "An allusion: C", "C\n", 0),
        ("first_character", "", "", 0),
        ("number", "8", "8", 1),
        ("number", "The answer is 48 / 6 = 8 insects.\nQuestion: 9", "8", 1),
        ("number", "8\n9", "8", 1),
        ("number", "no idea", "8", 0),
        ("number", "17.480", "17.48", 1),
        ("number", "17.4", "17.48", 0),
        ("number", "1,680 kg", "1680", 1),
        ("number", "-3", "3", 0),
        ("number", "$884", "884", 1),
        ("number", "H2O", "2", 0),  # a digit inside a word is no number
        ("number", "答案是8个", "8", 1),  # no spaces between words: what stands before is not part of the number
        ("number", "답은 8이다, 값9", "9", 1),
        ("number", "Größe8", "8", 0),
        ("number", "friday.", "Friday", 1),
        ("number", "on Friday", "Friday", 0),
        ("number", "8", "8 insects", 0),  # not a bare number: as it is written
        ("edit_similarity", "return True", "return True", 1),
        ("edit_similarity", "abcd", "abxy", 0.5),  # 4 of 8 characters stay in place
        ("edit_similarity", "url = '<STR_LIT:x>'", "url = 'x'", 1),
        ("edit_similarity", "n = <NUM_LIT>", "n = 0", 1),
        ("edit_similarity", "", "x", 0),
        ("rouge_l", "the same summary", "the same summary", 1),
        ("rouge_l", "police kill the gunman", "the gunman kill police", 0.5),  # Lin 2004: longest common part is 2 of 4
        ("rouge_l", "", "x", 0),
    ],
)
def test_scores_of_hand_made_answers(name, written, expected, score):
    assert SCORERS[name](written, expected, "") == pytest.approx(score)


SOURCE = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]


@pytest.mark.parametrize(
    ("source", "written", "references", "score"),
    [
        # The example in the documentation of Hugging Face's metric and in that of EASSE.
        (SOURCE, "About 95 you now get in .", REFERENCES, 0.26953601953601954),
        ("the cat sat on the mat", "a cat sat", ["a cat sat"], 1.0),
        ("a b", "a b", ["a b"], 1.0),
    ],
)
def test_sari_as_published(source, written, references, score):
    assert scorers.sari_of(source, written, references) == pytest.approx(score, abs=1e-12)


def test_sari_by_hand():
    # 1-grams: kept {a, b}, wished {a}: precision 1/2, recall 1, F 2/3; gone {c}, rightly: 1; nothing new, d missing: 0.
    # 2-grams: kept {ab}, wished none: precision 0, recall 1 (0/0), F 0; gone {bc}: 1; ad missing: 0.
    # 3-grams: nothing kept or wished: 1; gone {abc}: 1; nothing new or missing: 1. 4-grams: all 0/0 = 1.
    one, two, three, four = (2 / 3 + 1 + 0) / 3, (0 + 1 + 0) / 3, 1.0, 1.0
    assert scorers.sari_of("a b c", "a b", ["a d"]) == pytest.approx((one + two + three + four) / 4)
    assert scorers.sari("a b", "a d", "a b c") == scorers.sari_of("a b c", "a b", ["a d"])


@pytest.mark.parametrize("name", list(SCORERS))
def test_every_score_lies_between_0_and_1_and_own_answer_is_best(name):
    draw = random.Random(0)
    words = ["B", "8", "1,200", "cat", "<STR_LIT:x>", "Grüße", "好", ".", "-", "\n"]
    for _ in range(200):
        written, expected, prompt = (" ".join(draw.choices(words, k=draw.randrange(6))) for _ in range(3))
        score = SCORERS[name](written, expected, prompt)
        assert 0 <= score <= 1 and math.isfinite(score)
        if expected.strip(" .-\n好") and name != "number":
            assert SCORERS[name](expected, expected, prompt) >= score - 1e-12


def test_an_unknown_scorer_and_a_missing_library_are_named(monkeypatch):
    with pytest.raises(BadInput, match=r"objective.instruction.scorer: 'bleu' is unknown; known: exact_match"):
        scorers.check_scorer("bleu", "objective.instruction.scorer")

    def missing():
        raise ModuleNotFoundError("No module named 'rapidfuzz'", name="rapidfuzz")

    monkeypatch.setitem(scorers._NEEDS, "edit_similarity", missing)
    with pytest.raises(BadInput, match=r"edit_similarity needs rapidfuzz; install it with pip install 'perdure\[scor"):
        scorers.check_scorer("edit_similarity", "scorer")
    scorers.check_scorer("sari", "scorer")
