"""How a written answer is scored against the expected one: each scorer gives one number in [0, 1] for a row.

All are means over rows, so that sums over batches add up. Libraries come with the extra `scorers`. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

from ..errors import BadInput


class Scorer(Protocol):
    def __call__(self, written: str, expected: str, prompt: str) -> float: ...


def exact_match(written: str, expected: str, prompt: str = "") -> float:
    """1 where both are the same but for white space at the ends."""
    return float(written.strip() == expected.strip())


def prefix(written: str, expected: str, prompt: str = "") -> float:
    """1 where what was written begins with the expected answer.

    The answer letter of TRACE's C-STANCE and FOMC, after which a model may go on. MoRAM's released code compares the
    shorter length of the two, so that a part of the answer passes as well; here the whole answer must be there.
    """
    expected = expected.strip()
    return float(bool(expected) and written.strip().startswith(expected))


def first_character(written: str, expected: str, prompt: str = "") -> float:
    """1 where the first characters are the same: the letter of ScienceQA, whose answers go on with reasons."""
    written, expected = written.strip(), expected.strip()
    return float(bool(written) and written[:1] == expected[:1])


def number(written: str, expected: str, prompt: str = "") -> float:
    """1 where the last number of the first line that holds one equals the expected number, to one part in a million.

    An expected answer that is no number (NumGLUE has weekdays) must be written as it is, upper or lower case. MoRAM's
    released code reads answers with a parser for mathematics of its own; this rule is ours.
    """
    goal = _numbers(expected)
    if len(goal) != 1 or _NUMBER.sub("", expected).strip(" .$%"):
        return float(written.strip().rstrip(".").casefold() == expected.strip().rstrip(".").casefold())
    found = next((numbers for line in written.splitlines() if (numbers := _numbers(line))), [])
    return float(bool(found) and math.isclose(found[-1], goal[0], rel_tol=1e-6, abs_tol=1e-9))


_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces: a digit behind them begins a number
_NUMBER = re.compile(rf"(?<![^\W{_CJK}])(?<!\.)[-+]?(?:\d{{1,3}}(?:,\d{{3}})+|\d+)?(?:\.\d+)?(?<=\d)(?:[eE][-+]?\d+)?")


def _numbers(text: str) -> list[float]:
    return [float(match.group().replace(",", "")) for match in _NUMBER.finditer(text) if match.group()]


def rouge_l(written: str, expected: str, prompt: str = "") -> float:
    """ROUGE-L F (Lin 2004), Google's implementation without stemming; its words are ASCII letters and digits.

    TRACE uses another package, whose tokens are parted by spaces alone, so that its figures differ a little.
    """
    return float(_rouge().score(expected, written)["rougeL"].fmeasure)


def edit_similarity(written: str, expected: str, prompt: str = "") -> float:
    """1 − indel distance / both lengths, as fuzzywuzzy's ratio, after the placeholders of Py150 were put in.

    `<STR_LIT:x>` and its kin become x, `<NUM_LIT>` 0 and the others nothing (TRACE, eval_Py150). The release rounds
    each ratio to per cent; here none is rounded. An empty answer scores 0.
    """
    if not written.strip() or not expected.strip():
        return 0.0
    return float(_rapidfuzz().ratio(_with_literals(written), _with_literals(expected))) / 100


def _with_literals(code: str) -> str:
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return re.sub(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", r"\1", code, flags=re.DOTALL)


def sari(written: str, expected: str, prompt: str = "") -> float:
    """SARI (Xu et al. 2016, TACL 4, eq. 3 to 8) of a simplification against its source, one reference.

    The source is the whole prompt, the words of the instruction included, as in TRACE. Lower case, tokens of
    sacrebleu's 13a, 0/0 = 1, as the metric of Hugging Face that TRACE calls; it is written here because that one is
    fetched from the network when it is used.
    """
    return sari_of(prompt, written, [expected])


def sari_of(source: str, written: str, references: Sequence[str]) -> float:
    """SARI in [0, 1] with any number of references; n-grams up to 4.

    Keep and delete count each reference as a vote; delete is precision alone, as in the authors' script.
    """
    tokens = [_tokens(text) for text in (source, written, *references)]
    total = 0.0
    for n in range(1, 5):
        grams = [[tuple(part[i : i + n]) for i in range(len(part) - n + 1)] for part in tokens]
        total += sum(_operations(grams[0], grams[1], grams[2:])) / 3
    return total / 4


Gram = tuple[str, ...]


def _operations(source: list[Gram], written: list[Gram], references: list[list[Gram]]) -> tuple[float, float, float]:
    """Keep F, delete precision, add F of one n-gram length."""
    votes = Counter(gram for reference in references for gram in reference)
    before = Counter({gram: count * len(references) for gram, count in Counter(source).items()})
    after = Counter({gram: count * len(references) for gram, count in Counter(written).items()})
    kept, wished = before & after, before & votes
    good = kept & votes
    keep = _f(_mean(good[gram] / kept[gram] for gram in kept), good.total() / wished.total() if wished else 1.0)
    gone = before - after
    rightly = gone - votes
    delete = _mean(rightly[gram] / gone[gram] for gram in gone)
    new, missing = set(after) - set(before), set(votes) - set(before)
    right = len(new & set(votes))
    return keep, delete, _f(right / len(new) if new else 1.0, right / len(missing) if missing else 1.0)


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 1.0


def _f(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


SCORERS: dict[str, Scorer] = {
    scorer.__name__: scorer for scorer in (exact_match, prefix, first_character, number, rouge_l, edit_similarity, sari)
}
_NEEDS: dict[str, Callable[[], Any]]


def check_scorer(name: str, field: str) -> None:
    """Raises BadInput where a scorer is unknown or its library is not installed."""
    if name not in SCORERS:
        raise BadInput(f"{field}: {name!r} is unknown; known: {', '.join(SCORERS)}")
    needed = _NEEDS.get(name)
    if needed is not None:
        try:
            needed()
        except ModuleNotFoundError as error:
            raise BadInput(
                f"{field}: {name} needs {error.name}; install it with pip install 'perdure[scorers]'"
            ) from None


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


def _rapidfuzz() -> Any:
    from rapidfuzz import fuzz

    return fuzz


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def _tokens(text: str) -> list[str]:
    return _tokenizer()(text.lower()).split()


_NEEDS = {"rouge_l": _rouge, "edit_similarity": _rapidfuzz, "sari": _tokenizer}
