"""Causal language modelling: plain text, prompt with answer, or messages. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..config import ObjectiveConfig
from ..data import Batch, Output, Row, Rows, wide
from ..errors import BadInput
from ..processors import check_tokenizer, encode_texts, pad_id, position_limit, tokenizer_of
from ._objective import Objective, index_tensor, pad_right, register, require

if TYPE_CHECKING:
    from torch import Tensor

    from ..heads import Head

REMEDY = "a language-modelling row has `text`, or `prompt` and `answer`, or `messages`"


@register("causal_lm")
class CausalLM(Objective):
    """Causal language modelling with the host's own output layer.

    loss = Σ -log p(token t+1 | tokens up to t), summed over the tokens with a label: all of a `text`, the `answer`
    after a `prompt`, the assistant's turns of `messages`. The score is perplexity, exp(loss / tokens). Prompt and
    answer are tokenised apart and joined as they are: a space between them belongs to one of them.
    """

    metric = "perplexity"
    higher_is_better = False
    needs_head = False
    predicts_tokens = True

    class Config(ObjectiveConfig):
        block_size: int | None = Field(256, ge=2)
        """Tokens of a row at the most; null for no limit. A text loses its end, a prompt its beginning."""
        append_eos: bool = True
        """An end token after each answer, so that generation learns to stop. Plain text gets none."""

    config: CausalLM.Config

    # ---- rows
    def check(self, rows: Rows, processor: Any) -> None:
        tokenizer = tokenizer_of(processor)
        for position, row in enumerate(rows):
            kind = _kind(row, position, tokenizer)
            if kind == "answer":
                require(row, position, "prompt", str, REMEDY)
                if not require(row, position, "answer", str, REMEDY):
                    raise BadInput(f"row {position}: field 'answer' is empty; {REMEDY}")
            elif kind == "text" and not require(row, position, "text", str, REMEDY):
                raise BadInput(f"row {position}: field 'text' is empty; leave the row out")
            elif kind == "messages":
                _messages(row, position)

    def check_model(self, model: Any, processor: Any) -> None:
        tokenizer = tokenizer_of(processor)
        check_tokenizer(tokenizer, model)
        if model.get_output_embeddings() is None:
            raise BadInput(
                f"model: {type(model).__name__} has no language-modelling head; load it with AutoModelForCausalLM"
            )
        self.check_length(model)

    def check_length(self, model: Any) -> None:
        """Raises BadInput where rows may be longer than the model's positions."""
        limit, size = position_limit(model), self.longest
        if limit is not None and (size is None or size > limit):
            raise BadInput(
                f"objective.block_size: {size} is more than the model's {limit} positions; set it to {limit} or less"
            )

    @property
    def longest(self) -> int | None:
        """Tokens of a row at the most."""
        return self.config.block_size

    def cut(self, prompt: list[int], answer: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
        """Prompt and answer at their greatest lengths: the answer loses its end, the prompt its beginning."""
        size = self.longest
        if size is not None:
            # One token of the prompt stays: the first answer token is predicted from it.
            answer = answer[: size - 1] if prompt else answer[:size]
            prompt = last_tokens(prompt, size - len(answer), tokenizer)
        return prompt, answer

    def encode(
        self, rows: Rows, processor: Any, training: bool = False, seeds: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        tokenizer = tokenizer_of(processor)
        pad = pad_id(tokenizer)
        kinds = [_kind(row, i, tokenizer) for i, row in enumerate(rows)]
        plain = [i for i, kind in enumerate(kinds) if kind == "text"]
        texts = [require(rows[i], i, "text", str, REMEDY) for i in plain]
        tokens = dict(zip(plain, encode_texts(tokenizer, texts, self.longest), strict=True))
        out = []
        for position, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
            if kind == "text":
                ids = labels = tokens[position]
            elif kind == "answer":
                ids, labels = self._answer(row, position, tokenizer)
            else:
                ids, labels = self._conversation(row, position, tokenizer)
            if not ids:
                raise BadInput(f"row {position}: gives no token; leave it out")
            out.append({"input_ids": ids, "labels": labels, "pad": pad})
        return out

    def _answer(self, row: Row, position: int, tokenizer: Any) -> tuple[list[int], list[int]]:
        answer_text = require(row, position, "answer", str, REMEDY)
        prompt = prompt_ids(tokenizer, require(row, position, "prompt", str, REMEDY))
        answer = encode_texts(tokenizer, [answer_text], special=False)[0]
        end = getattr(tokenizer, "eos_token_id", None)
        if self.config.append_eos and end is not None:
            answer = [*answer, end]
        if not answer:
            raise BadInput(f"row {position}: field 'answer' gives no token, found {answer_text!r}; {REMEDY}")
        prompt, answer = self.cut(prompt, answer, tokenizer)
        return prompt + answer, [-100] * len(prompt) + answer

    def _conversation(self, row: Row, position: int, tokenizer: Any) -> tuple[list[int], list[int]]:
        messages = _messages(row, position)
        ids = _template(tokenizer, messages, False)
        labels = [-100] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = _template(tokenizer, messages[:turn], True)
            after = _template(tokenizer, messages[: turn + 1], False)
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise BadInput(
                    f"row {position}: field 'messages': the chat template rewrites earlier turns, so that the answer "
                    f"of turn {turn} cannot be told apart; give `prompt` and `answer`"
                )
            labels[len(before) : len(after)] = after[len(before) :]
        return self.cut_conversation(ids, labels, tokenizer)

    def cut_conversation(self, ids: list[int], labels: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
        """Tokens and labels of a conversation at its greatest length: it loses its beginning."""
        if self.longest is not None:
            ids = last_tokens(ids, self.longest, tokenizer)
        return ids, labels[len(labels) - len(ids) :]

    def collate(
        self,
        encoded: Sequence[Mapping[str, Any]],
        rows: Rows,
        labels: Mapping[str, int] | None = None,
        index: Sequence[int] | None = None,
    ) -> Batch:
        """Padded on the right; labels are token ids [B, T], not shifted. `labels` is not used: there are no classes."""
        ids = [e["input_ids"] for e in encoded]
        inputs = {
            "input_ids": pad_right(ids, encoded[0]["pad"]),
            "attention_mask": pad_right([[1] * len(i) for i in ids], 0),
        }
        return Batch(inputs, pad_right([e["labels"] for e in encoded], -100), rows, index_tensor(rows, index))

    # ---- the model
    def forward(self, model: Any, head: Head | None, batch: Batch, pooling: str | None = None) -> Output:
        host = model(**batch.inputs, use_cache=False)
        return Output(logits=host.logits, host=host)

    # ---- loss and score
    def loss(self, batch: Batch, output: Output, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`allowed` has no meaning here: all token ids compete."""
        nll, counted = _token_nll(batch, output)
        return nll.sum(), counted.sum()

    def score(self, batch: Batch, output: Output, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        nll, counted = _token_nll(batch, output)
        return nll.double().sum(), counted.sum()

    def finish(self, total: float, count: int) -> float:
        """Perplexity, exp(nll / tokens); infinite where that is beyond float64."""
        if not count:
            return float("nan")
        mean = float(total) / int(count)
        if mean > 709:
            return float("inf")
        return math.exp(mean)

    def generate(
        self,
        model: Any,
        processor: Any,
        rows: Rows,
        max_new_tokens: int = 64,
        batch_size: int = 8,
        max_prompt: int | None = None,
        **options: Any,
    ) -> list[str]:
        """What the model writes after each row's `prompt`, else `messages` up to the last user turn, else `text`.

        Padded on the left, of a prompt the last `max_prompt` tokens, greedy unless `options` of `model.generate` say
        otherwise; the answer ends before its end token, one to `messages` also before what ends a turn. The rules
        `repetition_penalty` and `no_repeat_ngram_size` do not look at the padding. The model's training mode is put
        back.
        """
        import torch

        tokenizer = tokenizer_of(processor)
        ends, pad = _ends(rows, tokenizer), pad_id(tokenizer)
        prompts = [self._to_continue(row, i, tokenizer, max_new_tokens, model) for i, row in enumerate(rows)]
        if max_prompt is not None:
            prompts = [last_tokens(ids, max_prompt, tokenizer) for ids in prompts]
        device = model.get_input_embeddings().weight.device
        settings = {"do_sample": False, "num_beams": 1, "pad_token_id": pad, "eos_token_id": ends or None, **options}
        rules = _rules(settings)
        training = model.training
        model.eval()
        texts: list[str] = []
        try:
            for start in range(0, len(prompts), batch_size):
                part = prompts[start : start + batch_size]
                ids, mask = (pad_right([x[::-1] for x in xs], fill).flip(1) for xs, fill in _with_masks(part, pad))
                with torch.no_grad():
                    out = model.generate(
                        input_ids=ids.to(device),
                        attention_mask=mask.to(device),
                        max_new_tokens=max_new_tokens,
                        **settings,
                        **({"logits_processor": [PastPadding(rules, (mask == 0).sum(1).tolist())]} if rules else {}),
                    )
                for new in out[:, ids.shape[1] :].tolist():
                    stop = next((number for number, token in enumerate(new) if token in ends), len(new))
                    texts.append(tokenizer.decode(new[:stop], skip_special_tokens=True))
        finally:
            model.train(training)
        return texts

    def _to_continue(self, row: Row, position: int, tokenizer: Any, new: int, model: Any) -> list[int]:
        if row.get("prompt") is not None:
            ids = prompt_ids(tokenizer, require(row, position, "prompt", str, REMEDY))
        elif row.get("messages") is not None:
            _kind(row, position, tokenizer)
            messages = list(_turns(row, position))  # without an answer where methods must not see it
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            ids = _template(tokenizer, messages, True)
        else:
            ids = prompt_ids(tokenizer, require(row, position, "text", str, REMEDY))
        if not ids:
            raise BadInput(f"row {position}: the prompt gives no token; {REMEDY}")
        limit = position_limit(model)
        if limit is not None:
            if new >= limit:
                raise BadInput(f"max_new_tokens: {new} leaves no room for a prompt in {limit} positions")
            ids = last_tokens(ids, limit - new, tokenizer)
        return ids


class PastPadding:
    """Rules of generation that see each row without the padding before it, so that a row is continued alike alone and
    in a batch. Padding is often the end token, which would be punished as a repetition.
    """

    def __init__(self, rules: Sequence[Any], padding: Sequence[int]):
        self.rules, self.padding = rules, padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        import torch

        each, out = len(scores) // len(self.padding), []  # with beams a row has several lines
        for number in range(len(scores)):
            seen, mine = input_ids[number : number + 1, self.padding[number // each] :], scores[number : number + 1]
            for rule in self.rules:
                mine = rule(seen, mine)
            out.append(mine)
        return torch.cat(out)


def _rules(settings: dict[str, Any]) -> list[Any]:
    """Takes the rules that look at earlier tokens out of the settings of generation; the model's own are then off."""
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    rules: list[Any] = []
    if settings.get("repetition_penalty") is not None:
        if settings["repetition_penalty"] != 1:
            rules.append(RepetitionPenaltyLogitsProcessor(float(settings["repetition_penalty"])))
        settings["repetition_penalty"] = 1.0
    if settings.get("no_repeat_ngram_size") is not None:
        if settings["no_repeat_ngram_size"]:
            rules.append(NoRepeatNGramLogitsProcessor(settings["no_repeat_ngram_size"]))
        settings["no_repeat_ngram_size"] = 0
    return rules


def _ends(rows: Rows, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's own and, of conversations, what its template closes a turn with.

    Learnt from conversations, a model writes no other end than the template's, which need not be the tokenizer's
    (Gemma).
    """
    end = getattr(tokenizer, "eos_token_id", None)
    ends = [] if end is None else [end]
    if any(row.get("prompt") is None and row.get("messages") is not None for row in rows):
        asked = [{"role": "user", "content": "?"}]
        opened = _template(tokenizer, asked, True)
        closed = _template(tokenizer, [*asked, {"role": "assistant", "content": "x"}], False)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        after = [token for token in closed[len(opened) :] if token in added and added[token].special]
        if closed[: len(opened)] == opened and after:
            ends = list(dict.fromkeys([*ends, after[0]]))
    return ends


def last_tokens(ids: list[int], size: int, tokenizer: Any) -> list[int]:
    """The end of a prompt that is too long; the token that opens every text stays: some models go astray without it."""
    if len(ids) <= size:
        return ids
    first = getattr(tokenizer, "bos_token_id", None)
    if size > 1 and first is not None and ids[0] == first:
        return [first, *ids[len(ids) - size + 1 :]]
    return ids[len(ids) - size :]


def _with_masks(prompts: list[list[int]], pad: int) -> list[tuple[list[list[int]], int]]:
    return [(prompts, pad), ([[1] * len(p) for p in prompts], 0)]


def _kind(row: Any, position: int, tokenizer: Any) -> str:
    if isinstance(row, Mapping):
        if row.get("answer") is not None or row.get("prompt") is not None:
            return "answer"
        if row.get("messages") is not None:
            if getattr(tokenizer, "chat_template", None) is None:
                raise BadInput(
                    f"row {position}: field 'messages' needs a chat template, which the tokenizer "
                    f"{type(tokenizer).__name__} has not; give `prompt` and `answer`"
                )
            return "messages"
    require(row, position, "text", str, REMEDY)
    return "text"


def _turns(row: Row, position: int) -> Sequence[Mapping[str, Any]]:
    messages = require(row, position, "messages", (list, tuple), REMEDY)
    for turn, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise BadInput(
                f"row {position}: field 'messages': turn {turn} lacks `role` or `content`; found {message!r}"
            )
    if not messages or messages[0]["role"] == "assistant":
        raise BadInput(f"row {position}: field 'messages' does not begin with a question; give one, or leave it out")
    return messages


def _messages(row: Row, position: int) -> Sequence[Mapping[str, Any]]:
    messages = _turns(row, position)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadInput(f"row {position}: field 'messages' has no turn of the role 'assistant' to learn from; add one")
    return messages


def _template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], opens_answer: bool) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opens_answer)
    # The template writes the special tokens itself.
    return encode_texts(tokenizer, [text], special=False)[0]


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids with the tokens that open a text, without one that would end it before the answer."""
    ids = encode_texts(tokenizer, [text])[0]
    if ids and ids[-1] == getattr(tokenizer, "eos_token_id", None) and len(ids) > 1:
        ids = ids[:-1]
    return ids


def _token_nll(batch: Batch, output: Output) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [B (T - 1)] float32, zero where no label is, and whether it counts."""
    from torch.nn.functional import cross_entropy

    if output.logits is None or batch.labels is None:
        raise ValueError("causal_lm: loss and score need logits and labels")
    labels = batch.labels[:, 1:].reshape(-1)
    logits = wide(output.logits[:, :-1].reshape(-1, output.logits.shape[-1]))
    return cross_entropy(logits, labels, ignore_index=-100, reduction="none"), labels != -100
