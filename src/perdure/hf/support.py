"""What of perdure runs under a Hugging Face Trainer, and what is refused there with a reason, before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import BadInput
from ..hosts.roles import PREFIX
from ..methods import Method


def check_methods(methods: Sequence[Method], trainer: Any) -> None:
    """Raises BadInput where a method needs what only the Learner's own loop can give."""
    for method in methods:
        reason = _reason(method, trainer)
        if reason:
            raise BadInput(
                f"method: {method.name} does not run under the Hugging Face Trainer: {reason}; choose another method, "
                "or train with perdure.Learner"
            )


def _reason(method: Method, trainer: Any) -> str:
    config = method.config
    if "rehearsal" in method.needs:
        return "it adds stored rows to a batch, and here the batches are the Trainer's own"
    if "all_data" in method.needs:
        return "it trains on all experiences together at the end"
    if "features" in method.needs:
        return "it compares pooled features, which a model with a head of its own does not give"
    if "old_model" in method.needs and is_sft(trainer):
        return "it compares scores with those of the last model, and SFTTrainer's fused loss gives no scores"
    if method.criterion is not None:
        return "it replaces the loss, and here the loss is the Trainer's"
    if method.predict is not None:
        return "with these settings it must know the task of each row when it predicts, which a row here does not say"
    if type(method).sampler is not Method.sampler or type(method).transform is not Method.transform:
        return "it chooses or changes training rows, and here these are the Trainer's own"
    for name, told in (
        ("pretrain", "gives the first experience epochs of its own; run a Trainer of its own first"),
        ("grow_every", "adds parameters between steps, which the Trainer's optimizer does not follow"),
    ):
        if getattr(config, name, None) is not None:
            return f"its setting {name} {told}"
    return ""


def check_shared(model: Any) -> None:
    """Raises BadInput where an attached method keeps one tensor under several names: transformers cannot save it."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(part.startswith(PREFIX) for part in name.split(".")):
            other = owners.setdefault(id(parameter), name)
            if other != name:
                raise BadInput(
                    f"method: keeps one tensor under the names {other} and {name}, which the Trainer's checkpoints "
                    "cannot hold; choose settings that do not share (sd_lora: magnitudes per_map), or train with "
                    "perdure.Learner"
                )


def is_sft(trainer: Any) -> bool:
    """Whether it is TRL's SFTTrainer or made from it."""
    return any(kind.__name__ == "SFTTrainer" for kind in type(trainer).__mro__)


def check_trainer(trainer: Any) -> None:
    """Raises BadInput where a setting of the Trainer would change what methods rely on; names the argument."""
    args = trainer.args
    wrong = [
        (trainer.model_init is not None, "model_init: makes a new model for each run; give `model`"),
        (args.world_size > 1, "several processes: not supported here; use perdure.Learner with `accelerate launch`"),
        (args.n_gpu > 1, "several GPUs in one process: set CUDA_VISIBLE_DEVICES to one of them"),
        (
            trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled,
            "DeepSpeed and FSDP: cut parameters up that methods read whole; remove them",
        ),
        (args.fp16, "fp16: scaled gradients would reach the methods, and steps may be left out; use bf16"),
        (args.torch_compile, "torch_compile: would be compiled anew at each growth; switch it off"),
        (args.auto_find_batch_size, "auto_find_batch_size: begins an experience again; set the batch size"),
        (
            args.load_best_model_at_end,
            "load_best_model_at_end: puts weights back without what methods keep beside them; switch it off",
        ),
        (_packed(trainer), "packing, padding_free: put several texts into one row; switch them off"),
        (hasattr(trainer.model, "peft_type"), "model: is a PEFT model; perdure brings its own adapters, give the base"),
    ]
    for found, told in wrong:
        if found:
            raise BadInput(f"Trainer: {told}")


def _packed(trainer: Any) -> bool:
    return bool(getattr(trainer, "padding_free", False) or getattr(trainer.args, "packing", False))


def check_optimizer(trainer: Any) -> None:
    """Raises BadInput where the Trainer came with an optimizer or a schedule of the user's own."""
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise BadInput(
            "Trainer: optimizers: were made before the method brought its parameters; leave them out and set optim, "
            "learning_rate and lr_scheduler_type"
        )
