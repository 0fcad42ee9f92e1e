"""`PerdureCallback`: growth, masks, losses, proximal steps and the forgetting report in a Trainer's own script.

The one module that imports transformers at its top, since the callback must be one of theirs; `import perdure` does not
import it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from ..errors import BadInput
from .loop import TrainerLoop
from .record import Record
from .steps import Steps
from .support import check_optimizer

log = logging.getLogger(__name__)
AnyTrainer = TypeVar("AnyTrainer")
FOLDER = "perdure"


class PerdureCallback(TrainerCallback):
    """A continual-learning method inside a Trainer: each call of `trainer.train()` learns one experience.

    ```python
    callback = perdure.PerdureCallback(method={"moram": {"rank": 8}})
    trainer = callback.bind(Trainer(model, args, train_dataset=news, eval_dataset={"news": ..., "law": ...}))
    trainer.train()                      # experience 1, "news"
    trainer.train_dataset = law
    trainer.train()                      # experience 2, "law"; both test sets are scored
    ```

    The n-th experience has the name of the n-th evaluation set. Checkpoints go to `output_dir/experience-<n>/`; the
    report is written to `output_dir/report.html` and `report.json` after each experience.
    `trainer.train(resume_from_checkpoint=True)` goes on after a crash: experiences that have ended are not learnt
    again.

    Args:
        method: a name, `{name: settings}`, or a list of these, as `perdure.Learner` takes them.
        eval_sets: name -> data set as the Trainer's collator takes it, in the order in which experiences come. When
            absent, the Trainer's `eval_dataset` where that is a mapping; without one nothing is scored.
        head_learning_rate: of the model's own classification head; the Trainer's learning rate when absent.

    Attributes:
        matrix: R[i][j], score on experience j after learning experience i: accuracy in [0, 1], or perplexity.
        report: the report after the last experience, None before.
    """

    def __init__(
        self, method: Any = "moram", *, eval_sets: Mapping[str, Any] | None = None,
        head_learning_rate: float | None = None,
    ):  # fmt: skip
        self._method, self._eval_sets, self._head_rate = method, eval_sets, head_learning_rate
        self._loop: TrainerLoop | None = None
        self._steps: Steps | None = None
        self._record = Record()
        self._base_hash = ""
        self.report: dict[str, Any] | None = None

    # ---- binding
    def bind(self, trainer: AnyTrainer) -> AnyTrainer:
        """Puts the method into the Trainer's model and perdure into its steps; returns the same Trainer.

        A script that makes a new Trainer for each experience binds each of them, all with the same model.

        Raises:
            BadInput: the method, the model or an argument of the Trainer does not fit; nothing is changed then.
        """
        from ..state import model_hash

        it: Any = trainer
        check_optimizer(it)
        if self._loop is None:
            self._loop = TrainerLoop(it, self._method, self._head_rate)
            self._base_hash = model_hash(self._loop.frozen_base())
        else:
            if self._loop.position.phase == "train":
                raise BadInput("bind: the last train() did not end; call it again, or `abandon`")
            self._loop.follow(it)
        before = self._unbind()
        if before is not None and before is not it:
            before.train = _refuse
        self._steps, self._train = Steps(it, self._loop), it.train
        it.train = self.train
        if self not in it.callback_handler.callbacks:
            it.add_callback(self)
        return trainer

    def _unbind(self) -> Any:
        """Gives the Trainer its own methods back and returns it; None where there is none."""
        if self._steps is None:
            return None
        steps, self._steps = self._steps, None
        steps.remove()
        vars(steps.trainer).pop("train", None)
        steps.trainer.remove_callback(self)
        return steps.trainer

    def detach(self) -> nn.Module:
        """Takes everything out of Trainer and model and returns the model: the original, bit for bit."""
        loop = self._bound()
        self._unbind()
        return loop.detach()

    def _bound(self) -> TrainerLoop:
        if self._loop is None:
            raise BadInput("PerdureCallback: belongs to no Trainer yet; call `callback.bind(trainer)` before training")
        return self._loop

    # ---- one experience
    @property
    def matrix(self) -> list[list[float | None]]:
        return self._record.matrix

    @property
    def _sets(self) -> Mapping[str, Any]:
        if self._eval_sets is not None:
            return self._eval_sets
        given = self._bound().trainer.eval_dataset
        return given if isinstance(given, Mapping) else {}

    def _name(self, number: int) -> str:
        names = list(self._sets)
        return names[number] if number < len(names) else f"experience {number + 1}"

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs: Any) -> TrainOutput:
        """Stands in the place of `trainer.train`: the same arguments, one experience a call.

        Raises:
            BadInput: an argument of the Trainer does not fit, or there is nothing to resume from.
        """
        loop, steps = self._bound(), self._steps
        assert steps is not None
        trainer = loop.trainer
        if trial is not None:
            raise BadInput("train: trial: hyper-parameter search begins a model again and again; remove it")
        loop.refuse_detached()
        loop.follow(trainer)  # its arguments may have changed since
        number = loop.position.experience
        experience = loop.experience_of(trainer.train_dataset, self._name(number))
        folder = Path(trainer.args.output_dir)
        checkpoint = self._found(resume_from_checkpoint, folder, number)
        if checkpoint is not None:
            self._load(checkpoint / FOLDER, experience)
            if loop.position.phase == "boundary":  # learnt to its end
                log.info("%s: was learnt before, its state is loaded from %s", experience.name, checkpoint)
                return TrainOutput(loop.counters.steps, 0.0, {})
        elif loop.position.phase == "train":
            raise BadInput(
                f"train: experience {loop.history[-1].name!r} was left at step {loop.position.step}; give "
                "resume_from_checkpoint, or call `callback.abandon()` to leave the rest of it"
            )
        else:
            loop.begin(experience)
        loop.current, loop._clock = experience, time.perf_counter()
        self._record.trainable = max(self._record.trainable, loop.trainable_parameters())
        output = self._run(folder / f"experience-{number + 1}", checkpoint, kwargs)
        loop.end()
        loop.tick()
        self._after(folder)
        return output

    def _run(self, folder: Path, checkpoint: Path | None, kwargs: dict[str, Any]) -> TrainOutput:
        """The Trainer's own run, its checkpoints in `folder`."""
        loop, steps = self._bound(), self._steps
        assert steps is not None
        trainer = loop.trainer
        if not loop.named_trainable():
            log.info("%s: nothing trains in this experience", loop.history[-1].name)
            return TrainOutput(0, 0.0, {})
        asked = trainer.args.output_dir
        trainer.args.output_dir, steps.learning = str(folder), True
        try:
            return self._train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **kwargs)
        except BaseException:
            loop.take_back()
            raise
        finally:
            trainer.args.output_dir, steps.learning = asked, False
            trainer.optimizer = trainer.lr_scheduler = None  # the next experience has parameters of its own
            loop.model.eval()

    def abandon(self) -> None:
        """Gives up the experience in whose middle an error has left the model; what its steps have changed stays."""
        self._bound().abandon()

    # ---- the Trainer's events
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loop = self._bound()
        assert self._steps is not None
        if not self._steps.learning or loop.position.step != state.global_step:
            raise BadInput(
                f"PerdureCallback: the Trainer begins at step {state.global_step}, the method at "
                f"{loop.position.step}; begin with `train` of the Trainer that was bound"
            )
        loop.steps_planned = state.max_steps
        loop._steps_per_epoch = max(1, -(-state.max_steps // max(1, int(state.num_train_epochs))))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._steps is not None
        self._steps.before_update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._steps is not None
        self._steps.after_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._steps is not None
        self._steps.after_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._steps is not None and self._steps.learning and logs and "loss" in logs:
            loop = self._bound()
            self._record.losses.append([loop.counters.steps, loop.position.experience, float(logs["loss"])])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER)

    # ---- after an experience
    def _after(self, folder: Path) -> None:
        """Scores, saves and reports."""
        loop = self._bound()
        self._record.add(loop, self._sets)
        learnt = loop.position.experience
        self._save(folder / f"experience-{learnt}" / FOLDER)
        complete = learnt >= len(self._sets)
        self.report = self._record.report(loop, folder.name or FOLDER, complete)
        self._record.write(self.report, folder)
        figures = {f"perdure/{key}": self.report["metrics"][key] for key in ("average_accuracy", "forgetting")}
        loop.trainer.log({key: value for key, value in figures.items() if value is not None})

    # ---- state
    def _save(self, folder: Path) -> None:
        from ..state.portable import write_portable

        loop = self._bound()
        tensors, values = loop.state_dict()
        values |= {"record": self._record.state(), "base": {"hash": self._base_hash, "name": loop._base_name()}}
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_portable(folder, tensors, values)

    def _found(self, asked: str | bool | None, folder: Path, number: int) -> Path | None:
        """The folder in which the state is that training goes on from; None to begin."""
        if not asked:
            return None
        if isinstance(asked, bool):
            own = folder / f"experience-{number + 1}"
            if (own / FOLDER).is_dir():
                return own
            last = get_last_checkpoint(str(own)) if own.is_dir() else None
            return None if last is None else Path(last)
        if not (Path(asked) / FOLDER).is_dir():
            raise BadInput(
                f"resume_from_checkpoint: {asked} has no folder {FOLDER!r}, so it holds nothing of the method; give a "
                "checkpoint that was saved with this callback"
            )
        return Path(asked)

    def _load(self, folder: Path, experience: Any) -> None:
        from ..state.portable import read_portable

        loop = self._bound()
        tensors, values = read_portable(folder)
        if values["base"]["hash"] != self._base_hash:
            raise BadInput(
                f"resume_from_checkpoint: {folder} was learnt on another model ({values['base']['name'] or 'unnamed'});"
                " give the Trainer that model"
            )
        number, past = len(values["history"]) - 1, values["history"][-1]
        if number != experience.index or past["hash"] != experience.hash:
            raise BadInput(
                f"resume_from_checkpoint: {folder} is of experience {number + 1} ({past['name']}), whose rows are "
                f"not those of the Trainer's train_dataset, experience {experience.index + 1} ({experience.name}); "
                "give the data set that it was saved with"
            )
        loop.load_state_dict(tensors, values)
        self._record.load_state(values["record"])

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes what was learnt, without base weights and optimizer.

        `perdure.Learner.from_pretrained` reads it where the model is a language model, `load_pretrained` always.
        """
        return self._bound().save_pretrained(folder)

    def export(self, folder: str | Path, to: str = "merged") -> dict[str, Any]:
        """Writes what was learnt for other programs: "merged", "peft" or "stacked"; see `export.export`."""
        return self._bound().export(folder, to)

    def load_pretrained(self, folder: str | Path) -> None:
        """Takes over what `save_pretrained` wrote, before the first experience of this callback.

        Raises:
            BadInput: something was learnt here already, or the folder belongs to another model or method.
        """
        from ..state.portable import read_portable

        loop = self._bound()
        if loop.history:
            raise BadInput("load_pretrained: this callback has learnt already; bind a new one to a fresh model")
        loop._take_over(*read_portable(Path(folder)), folder)


def _refuse(*_: Any, **__: Any) -> None:
    """`train` of a Trainer whose model learns under another one now."""
    raise BadInput("train: the callback was bound to another Trainer since; call `train` of the one bound last")
