"""The base of every method: hooks that the loop calls, all optional. Imports no torch.

The loop calls them in this order:
`attach(host)` · `parameter_groups()` · `before_experience(exp)` · `sampler(exp)`, `transform(sample)` ·
`before_step(batch)` · `criterion(batch, output)` · `losses(batch, output)` · `after_backward()` ·
`after_update(before)` · `after_step()` · `after_experience(exp)` · `predict(batch, forward)` ·
`on_request(kind, payload)`.

A method never calls `backward`, `step` or `zero_grad`; what needs gradients outside the step asks `self.loop`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..config import MethodConfig
from ..registry import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from ..config import ProtocolConfig
    from ..data import Batch, Output, Row, Rows
    from ..hosts import Host
    from ..services import Services
    from ..streams import Experience
    from ._updates import Stack, Update

register = METHODS.register
Status = Literal["verified", "unverified", "control", "upper bound"]


class Method:
    """One continual-learning method.

    Class attributes:
        needs: what the protocol must grant or the loop must offer: of "task_id", "boundaries", "rehearsal",
            "old_model", "features", "input_statistics", "gradients", "all_data", "write_ids" (whose write an item is,
            which without boundaries tells where one begins).
        adapts: True if the method brings trainable parameters beside or inside the host. If no method of a
            list adapts, the loop trains the whole model as `finetune` does.
        learns: False for a baseline that is meant to learn nothing.
        frozen_features: True if the host's features never change, so that they may be computed once and cached.
        renews: True if what trains is new in every experience and the old stands still or is merged, so that nothing
            lives on which a penalty could hold where it was.
        uses_host_weights: True if it trains, overwrites or takes gradients of weights of the host itself.
        splits_banks: True if `split_banks` can keep the frozen items of its banks in parts.
        adapts_alone: True if no other method of a list may adapt the host, because this one reads the host as it was.
        keeps_output: True if attaching leaves the host's outputs unchanged until something is learnt.
        removal: what taking one experience back means.
        status: what is known about this implementation.

    Instance attributes:
        modules: name -> nn.Module whose tensors are this method's state; saved and loaded by the base class.
        tensors: name -> Tensor, further state (statistics, bases).
        values: JSON-able state (counters, names).
        loop: services of the loop, set before `attach`.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    needs: ClassVar[frozenset[str]] = frozenset()
    adapts: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    frozen_features: ClassVar[bool] = False
    renews: ClassVar[bool] = False
    uses_host_weights: ClassVar[bool] = False
    splits_banks: ClassVar[bool] = False
    adapts_alone: ClassVar[bool] = False
    keeps_output: ClassVar[bool] = True
    removal: ClassVar[Literal["exact", "structural", "rollback"]] = "rollback"
    status: ClassVar[Status] = "unverified"
    citation: ClassVar[str] = ""

    loop: Services

    def __init__(self, config: Any):
        self.config = config
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, Any] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("title") and cls.__doc__:
            cls.title = cls.__doc__.strip().splitlines()[0].rstrip(".")

    # ---- life in the host
    def attach(self, host: Host) -> None:
        """Puts small modules into the host; must be repeatable after `detach`."""

    def detach(self, host: Host) -> None:
        """Takes out what `attach` put in; the host is then the original, bit for bit."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What trains: dicts with `params` (list of (name, Parameter)), and optionally `lr`, `weight_decay`,
        `optimizer` ("adamw", "sgd"; the training's when absent) and that optimizer's options (`betas`, `momentum`).
        """
        return []

    def split_banks(self, rank: int, processes: int) -> None:
        """From now on this process keeps its share of them alone (`training.shard`)."""

    def touched(self) -> list[tuple[str, nn.Parameter]]:
        """Host parameters that this method overwrites, whether or not they train right now."""
        return []

    @property
    def pretrains(self) -> bool:
        """Whether the host as a whole trains now: in the first experience, where the setting `pretrain` is there."""
        return getattr(self.config, "pretrain", None) is not None and self.loop.experiences_learnt <= 0

    def originals(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Of those in `touched` that are computed from their value at attach: the parameter and that value.

        The value counts as part of the frozen base, which a saved state is bound to by hash.
        """
        return []

    def requires_rehearsal(self) -> int:
        """Samples of past experiences that this configuration stores at the most."""
        return 0

    def check_protocol(self, protocol: ProtocolConfig) -> None:
        """Refuses settings that do not fit what is granted, beyond what `needs` says; asked before any work starts.

        Raises:
            BadInput: names the setting and what to do.
        """

    # ---- the experience
    def before_experience(self, experience: Experience) -> None: ...

    def sampler(self, experience: Experience) -> Rows | None:
        """Rows to train on instead of `experience.train`; None for no change, an empty list for no training."""
        return None

    def transform(self, sample: Row) -> Row:
        return sample

    # ---- the step
    def before_step(self, batch: Batch) -> Batch:
        """May add rehearsed rows (through `loop.replay`) or extras; returns the batch to learn from."""
        return batch

    criterion: Callable[[Batch, Output], tuple[Tensor, Tensor]] | None = None
    """Replaces the objective's loss where a method defines it. One owner per list.

    Returns the loss summed over the rows (or tokens) with a label, and their number. The loop divides the sum by the
    number over all micro-batches and processes, which it counts itself.
    """

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        """Scalars added to the loss, each logged under its name: means over the batch, or independent of it."""
        return {}

    def after_backward(self) -> None:
        """Gradients are complete and clipped next: mask or project them here."""

    needs_before_update: ClassVar[bool] = False
    """True if `after_update` wants the parameters' values from before the optimizer's step."""

    def after_update(self, before: dict[str, Tensor]) -> None:
        """The optimizer has stepped: what must not move is put back here."""

    def after_step(self) -> None: ...

    def after_experience(self, experience: Experience) -> None: ...

    # ---- use
    predict: Callable[[Batch, Callable[[Batch], Output]], Output] | None = None
    """Replaces the plain forward pass in evaluation and prediction. One owner per list."""

    def on_request(self, kind: str, payload: Any) -> Any:
        """Edit and forget requests."""
        from ..errors import BadInput

        raise BadInput(f"method {self.name!r} cannot honour the request {kind!r}")

    def left_by_forget(self) -> list[str]:
        """What of a forgotten write stays in this method's state, in words; it stands in the write's record."""
        return []

    def plasticity(self) -> dict[str, float]:
        """Figures of this method for the report, e.g. the share of slots won by new atoms."""
        return {}

    # ---- export
    merged: ClassVar[bool] = False
    """True if `updates` are in the host's weights already, between two experiences."""

    def updates(self) -> list[Update] | None:
        """All that this method does beside what it writes into the host's weights, as updates of linear maps.

        None where it is no such thing.
        """
        return None if self.adapts else []

    def stacks(self) -> dict[str, Stack]:
        """Routed items by the name of their place; none where the method has none."""
        return {}

    # ---- state
    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name and JSON-able values: all that a fresh process needs after `attach`."""
        tensors = {f"tensors/{name}": tensor for name, tensor in self.tensors.items()}
        for name, module in self.modules.items():
            for key, tensor in module.state_dict(keep_vars=False).items():
                tensors[f"modules/{name}/{key}"] = tensor
        return tensors, {"values": self.values}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restores what `state_dict` gave into a freshly attached method; sizes may have grown meanwhile."""
        self.tensors = {key[len("tensors/") :]: t for key, t in tensors.items() if key.startswith("tensors/")}
        for name, module in self.modules.items():
            prefix = f"modules/{name}/"
            module.load_state_dict({k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)})
        self.values = dict(values["values"])
