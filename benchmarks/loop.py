"""One training step through the Learner against the same step in a hand-written PyTorch loop.

    python -m benchmarks.loop             # the full setting: MiniLM, batch 32, 64 tokens, finetune and LoRA, 200 pairs
    python -m benchmarks.loop --pairs 4 --batch 4 --length 16     # a minute; the numbers mean nothing

Both arms start from the same weights, see the same batches and dropout masks, and their losses are compared on every
logged step: the command fails where they differ, because then it was not the same step. The hand-written arm lives in
the Learner's `on_step` callback, two steps of it in every other callback, so that the order swaps from pair to pair;
the callback's own time counts for neither. The Learner's time has everything it does per step: rows, tokenisation in
the prefetch thread (its processor time is seen in the `processor` ratio), collation, masks, checks and logging. The
hand-written arm makes tensors of ids that were tokenised before the clock started. Ratios are learner / hand-written.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from perdure.learner import Learner
from perdure.loading import Plan, derived_seed
from perdure.models import load_model
from perdure.registry import HEADS
from perdure.streams import Experience

from ._harness import Ratio, bootstrap_median, row, write

WARMUP, OLD_CLASSES, NEW_CLASSES, RANK, LOGGING = 4, 5, 15, 8, 10
RATES = {"finetune": 3e-5, "lora": 5e-4}
HEAD_RATE, CLIP, TOLERANCE, BAR = 3e-3, 1.0, 1e-3, 1.05
SYNCS = ("aten::_local_scalar_dense",)
COPIES = ("aten::_to_copy", "aten::copy_")
LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


class Count(TorchDispatchMode):
    """Counts reads of a tensor's value (a device stalls there) and copies, in this thread and its backward pass.

    Reads inside the optimizer stand apart: AdamW's step counts are CPU tensors, read once a parameter by both arms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.within = ""

    def __enter__(self) -> Any:
        def mark(word: str) -> Any:
            return lambda *_: setattr(self, "within", word)

        self.hooks = [
            register_optimizer_step_pre_hook(mark("optimizer ")), register_optimizer_step_post_hook(mark(""))
        ]  # fmt: skip
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in SYNCS or name in COPIES:
            self.found[self.within + ("reads" if name in SYNCS else "copies")] += 1
        return func(*args, **(kwargs or {}))


def make_rows(tokenizer: Any, count: int, length: int, classes: Sequence[str], seed: int) -> list[dict[str, str]]:
    """Rows of random one-token words whose encoding has exactly `length` tokens, special tokens included."""
    words = sorted(w for w in tokenizer.get_vocab() if w.isascii() and w.isalpha() and w.islower() and len(w) > 2)
    words = [word for word in words[:3000] if len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1]
    generator = random.Random(seed)
    inner = length - tokenizer.num_special_tokens_to_add()
    rows = [
        {"text": " ".join(generator.choices(words, k=inner)), "label": classes[n % len(classes)]} for n in range(count)
    ]
    lengths = {len(ids) for ids in tokenizer([row["text"] for row in rows])["input_ids"]}
    if lengths != {length}:
        raise RuntimeError(f"rows encode to {sorted(lengths)} tokens, wanted {length}")
    return rows


class HandWritten:
    """The step as one would write it without perdure: forward, masked cross-entropy, backward, clip, AdamW."""

    def __init__(self, method: str, learner: Learner, rows: list[dict[str, str]]):
        self.model, tokenizer, _ = load_model("minilm", "classification")
        if method == "lora":
            from peft import LoraConfig, inject_adapter_in_model

            targets = rf".*encoder\.layer\.\d+\..*({'|'.join(LINEARS)})"
            config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=targets)
            inject_adapter_in_model(config, self.model, adapter_name="perdure0")  # as the Learner names its first
        self.model.load_state_dict(learner.model.state_dict())
        self.model.to(learner.device).train()
        adapted = [p for name, p in self.model.named_parameters() if method == "finetune" or "lora_" in name]
        assert learner.head is not None
        grown = HEADS.get("cosine")(learner.head.config)  # draws the rows that the Learner's head will grow
        grown.build(learner.host.width, derived_seed(learner.seed, "head") % 2**31)
        grown.grow(OLD_CLASSES + NEW_CLASSES)
        weight, old = grown.module.weight.detach().clone(), learner.head.module
        weight[:OLD_CLASSES] = old.weight.detach()
        self.weight = nn.Parameter(weight.to(learner.device))
        self.scale = nn.Parameter(old.scale.detach().clone().to(learner.device))
        self.trained = [*adapted, self.weight, self.scale]
        head = {"params": [self.weight, self.scale], "lr": HEAD_RATE}
        groups = [{"params": adapted, "lr": RATES[method]}, head]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)  # as the Learner's: no crippled rival
        self.ids = tokenizer([row["text"] for row in rows])["input_ids"]
        self.labels = torch.tensor([OLD_CLASSES + int(row["label"][4:]) for row in rows])
        self.device = learner.device
        self.masked = (torch.arange(len(weight)) < OLD_CLASSES).to(self.device)  # the current classes compete

    def step(self, numbers: list[int], logged: bool) -> float | None:
        ids = torch.tensor([self.ids[n] for n in numbers]).to(self.device)
        labels, mask = self.labels[numbers].to(self.device), torch.ones_like(ids)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        features = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        logits = self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))
        loss = F.cross_entropy(logits.masked_fill(self.masked, float("-inf")), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()) if logged else None


class Duel:
    """Times the Learner's steps from callback to callback and runs the hand-written steps in between."""

    def __init__(self, hand: HandWritten, plan: Plan, learner: Learner, pairs: int):
        self.hand, self.plan, self.learner, self.pairs = hand, plan, learner, pairs
        self.order = plan.order(0)
        self.offset = learner.counters.steps
        self.learner_times: list[tuple[float, float]] = []
        self.hand_times: list[tuple[float, float]] = []
        self.losses: list[tuple[float, float]] = []
        self.hand_losses: dict[int, float] = {}
        self.counts: dict[str, dict[str, Counter[str]]] = {}
        self.counter: Count | None = None

    def logged(self, step: int) -> bool:
        return (self.offset + step) % LOGGING == 0

    def timed(self) -> int:
        return WARMUP + self.pairs

    def run_hand(self, step: int) -> None:
        (numbers,) = self.plan.micro_batches(step, self.order)
        torch.manual_seed(step)  # the same dropout masks as in the Learner's step of this number
        start = now(self.hand.device)
        loss = self.hand.step(numbers, self.logged(step))
        self.hand_times.append(since(start, self.hand.device))
        if loss is not None:
            self.hand_losses[step] = loss

    def on_step(self, learner: Any, losses: dict[str, float]) -> None:
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
        else:
            self.learner_times.append(since(self.start, learner.device))
        step = learner.position.step - 1
        if step < self.timed():
            if step % 2 == 0:
                self.run_hand(step)
                self.run_hand(step + 1)
        else:
            self.count_hand(step)
        if losses:
            self.losses.append((losses["loss"], self.hand_losses[step]))
        self.before(step + 1)

    def count_hand(self, step: int) -> None:
        (numbers,) = self.plan.micro_batches(step, self.order)
        kind = "logged" if self.logged(step) else "other"
        torch.manual_seed(step)
        with Count() as mine:
            loss = self.hand.step(numbers, self.logged(step))
        assert self.counter is not None
        self.counts[kind] = {"learner": self.counter.found, "hand_written": mine.found}
        if loss is not None:
            self.hand_losses[step] = loss

    def before(self, step: int) -> None:
        torch.manual_seed(step)
        if step >= self.timed():  # counting comes last: it would disturb the clock
            self.counter = Count()
            self.counter.__enter__()
        self.start = now(self.learner.device)


def now(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float], device: torch.device) -> tuple[float, float]:
    end = now(device)
    return end[0] - start[0], end[1] - start[1]


def ratio(a: list[float], b: list[float]) -> Ratio:
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    low, high = bootstrap_median(ratios)
    a_ms, b_ms = 1e3 * statistics.median(a), 1e3 * statistics.median(b)
    return Ratio(statistics.median(ratios), low, high, a_ms, b_ms, len(a))


def measure(method: str, pairs: int, batch: int, length: int) -> dict[str, Any]:
    """One method: its ratio, how far the losses are apart, and what each arm reads and copies per step."""
    pairs += pairs % 2
    model, tokenizer, _ = load_model("minilm", "classification")
    old = [f"old {n}" for n in range(OLD_CLASSES)]
    new = [f"new {n}" for n in range(NEW_CLASSES)]
    steps = WARMUP + pairs + LOGGING  # the last ones hold a logged step for certain
    rows = make_rows(tokenizer, steps * batch, length, new, seed=1)
    learner = Learner(
        model, tokenizer, method={"lora": {"rank": RANK}} if method == "lora" else method, head="cosine", seed=0,
        training={
            "learning_rate": RATES[method], "head_learning_rate": HEAD_RATE, "per_device_train_batch_size": batch,
            "max_grad_norm": CLIP, "logging_steps": LOGGING,
        },
    )  # fmt: skip
    # A first experience, so that the mask of the second has something to hide.
    learner.learn(Experience(0, "first", make_rows(tokenizer, batch, length, old, seed=2), classes=tuple(old)))
    hand = HandWritten(method, learner, rows)
    duel = Duel(hand, learner._plan(rows), learner, pairs)
    duel.before(0)
    learner.learn(Experience(1, "second", rows, classes=tuple(new)), on_step=duel.on_step)
    a, b = duel.learner_times[WARMUP : duel.timed()], duel.hand_times[WARMUP : duel.timed()]
    wall, processor = (ratio([t[i] for t in a], [t[i] for t in b]) for i in (0, 1))
    apart = max(abs(x - y) for x, y in duel.losses)
    trained = [sum(p.numel() for p in hand.trained), learner.trainable_parameters()]
    return {
        **row({"method": method}, "hand-written", wall),
        "processor": {"median": processor.median, "low": processor.low, "high": processor.high},
        "losses_compared": len(duel.losses),
        "largest_loss_difference": apart,
        "last_losses": duel.losses[-1],
        "trained_parameters": trained,
        "per_step": {kind: {arm: dict(c) for arm, c in arms.items()} for kind, arms in duel.counts.items()},
        "same_step": apart <= TOLERANCE and trained[0] == trained[1],
    }


def show(found: dict[str, Any]) -> None:
    interval, processor = f"{found['low']:.3f} to {found['high']:.3f}", found["processor"]["median"]
    print(
        f"{found['method']:<9} {found['median']:>6.3f}  {interval:<16} {found['a_ms']:>10.1f} {found['b_ms']:>10.1f} "
        f"{processor:>10.3f}  {found['largest_loss_difference']:.1e} of {found['losses_compared']}"
    )
    for kind, arms in found["per_step"].items():
        told = [f"{arm}: " + (", ".join(f"{n} {what}" for what, n in c.items()) or "none") for arm, c in arms.items()]
        print(f"{'':<9} {kind} step: {'; '.join(told)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--methods", default="finetune,lora")
    parser.add_argument("--output", type=Path, default=Path("results/speed/loop.json"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(
        f"{'method':<9} {'ratio':>6}  {'95 % interval':<16} {'learner ms':>10} {'by hand ms':>10} {'processor':>10}  "
        "largest difference of losses"
    )
    rows = []
    for method in options.methods.split(","):
        rows.append(measure(method, options.pairs, options.batch, options.length))
        show(rows[-1])
        save(options, rows)  # a later method may fail
    different = [found["method"] for found in rows if not found["same_step"]]
    if different:
        sys.exit(f"not the same step: the losses of {', '.join(different)} differ by more than {TOLERANCE}")


def save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    settings = {"model": "minilm", "batch": options.batch, "length": options.length, "pairs": options.pairs, "bar": BAR}
    notes = [
        "ratio: learner / hand-written, wall clock; `processor`: the same ratio of processor time, prefetch included",
        "reads: tensor values read by Python, each a stall on a device; copies: _to_copy and copy_, step's thread only",
    ]
    write(options.output, "loop", settings, rows, notes)


if __name__ == "__main__":
    main()
