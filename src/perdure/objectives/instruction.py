"""Instruction tuning: the loss is taken on the answer, the score on the answer that the model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ..config import ObjectiveConfig
from ..data import Batch, Output, Row, Rows
from ..errors import BadInput
from ..evaluation.scorers import SCORERS, check_scorer
from ..processors import position_limit, tokenizer_of
from ._objective import register
from .causal_lm import REMEDY, CausalLM, last_tokens, prompt_ids

if TYPE_CHECKING:
    from torch import Tensor


@register("instruction")
class Instruction(CausalLM):
    """Instruction tuning, scored on the answers that the model writes.

    Training is that of causal_lm: cross-entropy on the answer's tokens alone. In evaluation the model writes an answer
    to each prompt, greedily, and a scorer compares it with the row's own; the score of an experience is the mean over
    its rows, in [0, 1]. Rows have `prompt` and `answer`, or `messages` that end with the assistant's turn.
    """

    metric = "score"
    higher_is_better = True
    writes = True

    class Config(ObjectiveConfig):
        max_prompt: int = Field(1024, ge=1)
        """Tokens of a prompt; a longer one loses its beginning."""
        max_answer: int = Field(512, ge=2)
        """Tokens of an answer in training, its end token included, and of what the model may write."""
        append_eos: bool = True
        """An end token after each answer, so that the model learns to stop."""
        scorer: str = "exact_match"
        """exact_match, prefix, first_character, number, rouge_l, edit_similarity or sari."""
        scorers: dict[str, str] = Field(default_factory=dict)
        """Scorers of single experiences by their names; `scorer` holds for the others."""
        repetition_penalty: float = Field(1.0, gt=0)
        """Of generation; 1 for none."""
        no_repeat_ngram_size: int = Field(0, ge=0)
        """N-grams of this length are written once at the most; 0 for no such rule."""

        @field_validator("scorer", "scorers", mode="after")
        @classmethod
        def _known(cls, value: Any) -> Any:
            for name in [value] if isinstance(value, str) else value.values():
                if name not in SCORERS:
                    raise ValueError(f"{name!r} is unknown; known: {', '.join(SCORERS)}")
            return value

    config: Instruction.Config  # type: ignore[assignment]

    # ---- rows
    def check(self, rows: Rows, processor: Any) -> None:
        super().check(rows, processor)
        tokenizer = tokenizer_of(processor)
        for position, row in enumerate(rows):
            if row.get("text") is not None and row.get("prompt") is None and row.get("messages") is None:
                raise BadInput(
                    f"row {position}: field 'text' has no answer to learn; give `prompt` and `answer`, or take the "
                    "objective causal_lm"
                )
            answer, prompt = _expected(row, position)
            if row.get("prompt") is not None and not prompt.strip() and not prompt_ids(tokenizer, prompt):
                raise BadInput(
                    f"row {position}: field 'prompt' gives no token, found {prompt!r}, so there is nothing to answer to"
                )
            if not answer:
                raise BadInput(f"row {position}: the assistant's last turn in 'messages' is empty; leave the row out")

    def check_model(self, model: Any, processor: Any) -> None:
        super().check_model(model, processor)
        for field, name in (("scorer", self.config.scorer), *_named(self.config.scorers)):
            check_scorer(name, f"objective.instruction.{field}")

    def check_length(self, model: Any) -> None:
        limit, size = position_limit(model), self.longest
        if limit is not None and size > limit:
            raise BadInput(
                f"objective.instruction: max_prompt {self.config.max_prompt} and max_answer {self.config.max_answer} "
                f"are more than the model's {limit} positions; lower one of them"
            )

    @property
    def longest(self) -> int:
        return self.config.max_prompt + self.config.max_answer

    def cut(self, prompt: list[int], answer: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
        return last_tokens(prompt, self.config.max_prompt, tokenizer), answer[: self.config.max_answer]

    def cut_conversation(self, ids: list[int], labels: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
        """The last answer is cut like any other, what comes before it is its prompt."""
        start = len(labels)
        while start and labels[start - 1] != -100:
            start -= 1
        prompt, answer = self.cut(ids[:start], ids[start:], tokenizer)
        return prompt + answer, labels[start - len(prompt) : start + len(answer)]

    # ---- written answers
    def write(self, model: Any, processor: Any, batch: Batch) -> Output:
        """Answers to the prompts of a batch, written greedily; nothing of the rows' answers is read."""
        size, settings = max(len(batch.rows), 1), self.config
        texts = self.generate(
            model, processor, batch.rows, settings.max_answer, size, settings.max_prompt,
            repetition_penalty=settings.repetition_penalty, no_repeat_ngram_size=settings.no_repeat_ngram_size,
        )  # fmt: skip
        return Output(texts=texts)

    def grade(self, rows: Rows, texts: Sequence[str], name: str) -> tuple[Tensor, Tensor]:
        """Sum of the scores of written answers, float64, and their number.

        Args:
            rows: with their answers.
            texts: what was written, in the order of the rows.
            name: of the experience, which may have a scorer of its own.
        """
        import torch

        scorer = SCORERS[self.config.scorers.get(name, self.config.scorer)]
        scores = [
            scorer(text, *_expected(row, position))
            for position, (row, text) in enumerate(zip(rows, texts, strict=True))
        ]
        return torch.tensor(sum(scores), dtype=torch.float64), torch.tensor(len(scores))

    def finish(self, total: float, count: int) -> float:
        return total / count if count else float("nan")


def _expected(row: Row, position: int) -> tuple[str, str]:
    """The answer of a row and the prompt that it answers; of a conversation its last turn and the one before."""
    if row.get("prompt") is not None:
        return row["answer"], row["prompt"]
    messages = row["messages"]
    if messages[-1]["role"] != "assistant":
        raise BadInput(
            f"row {position}: field 'messages' does not end with the assistant's turn, which is scored; {REMEDY}"
        )
    before = [message["content"] for message in messages[:-1] if message["role"] == "user"]
    answer, prompt = messages[-1]["content"], before[-1] if before else ""
    if not isinstance(answer, str) or not isinstance(prompt, str):
        raise BadInput(
            f"row {position}: field 'messages': the last answer and its question must be texts, which are scored; "
            f"found {type(answer).__name__} and {type(prompt).__name__}"
        )
    return answer, prompt


def _named(scorers: dict[str, str]) -> list[tuple[str, str]]:
    return [(f"scorers.{experience}", name) for experience, name in scorers.items()]
