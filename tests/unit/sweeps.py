"""A small stream with validation rows, a recipe over it, and a runner inside the test's own process."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from perdure.errors import PerdureError
from perdure.processes import Finished, Job
from perdure.sweep import worker

RECIPE = """\
# my own recipe
name: mine
model: {{scratch: {{family: bert, layers: 1, width: 16, heads: 2, ffn_width: 32, max_length: 32}}}}
stream:
  source: {{path: {folder}/train.jsonl, test: {folder}/test.jsonl, valid: {folder}/valid.jsonl}}
  experiences: 3
objective: {{classification: {{max_length: 32}}}}
method: {{lora: {{rank: 2}}}}
training: {{learning_rate: 1e-3, per_device_train_batch_size: 4, num_threads: 1}}  # of all arms
tuning:
  # where the rates come from
  grid: {{learning_rate: [1e-3, 1e-2], head_learning_rate: [1e-2, 3e-2]}}
  source: by hand
arms:
  lora: {{}}
  frozen:  # the simple rival
    method: linear_probe
    training: {{head_learning_rate: 5e-2}}
  frozen+ridge: {{method: linear_probe, head: {{ridge: {{features: 32}}}}}}
"""


WORDS = ["ash", "birch", "cedar", "elm", "fir", "oak", "pine", "yew"]


def rows(kind: int, number: int, seed: str) -> list[dict[str, str]]:
    draw = random.Random(f"{kind}/{seed}")
    return [
        {"text": f"kind {' '.join(draw.choices(WORDS, k=4))} {kind}", "label": f"kind{kind}"} for _ in range(number)
    ]


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    """The recipe and the files that it reads: six classes, two to an experience."""
    for split, number in (("train", 8), ("valid", 3), ("test", 3)):
        lines = [json.dumps(row) + "\n" for kind in range(6) for row in rows(kind, number, split)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    path = folder / "mine.yaml"
    path.write_text(text.format(folder=folder), encoding="utf-8")
    return path


class Here:
    """Runs jobs in this process, one after another; `before` is called with each."""

    number = 2

    def __init__(self, before: Callable[[Job], int | None] = lambda job: None):
        self.before, self.jobs = before, 0

    def run(self, jobs: Sequence[Job], finished: Finished, tick: Callable[[], None]) -> None:
        waiting = deque(jobs)
        while waiting:
            job = waiting.popleft()
            self.jobs += 1
            printed, code = io.StringIO(), self.before(job)
            if code is None:
                with contextlib.redirect_stdout(printed):
                    code = self._work(job)
                job.log.write_text(printed.getvalue(), encoding="utf-8")
            tick()
            waiting.extend(finished(job, code))

    @staticmethod
    def _work(job: Job) -> int:
        assert job.arguments[:2] == ("-m", "perdure.sweep.worker")
        try:
            worker.work(Path(job.arguments[2]))
        except PerdureError as error:
            print(f"perdure: {error}")
            return error.exit_code
        return 0
