"""`attach` and `detach`: methods in and out of the user's own model object. Imports no torch."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import BadInput
from .registry import METHODS

if TYPE_CHECKING:
    from torch import nn

    from .hosts import Host
    from .methods import Method

    Model = TypeVar("Model", bound=nn.Module)

_ATTRIBUTE = "_perdure"


class Attachment:
    """What a model remembers of the methods in it: the Host and the methods, in the order of attaching.

    A deep copy of the model gets an attachment of its own; the loop that a method belongs to is shared, not copied.
    """

    def __init__(self, host: Host, methods: list[Method]):
        self.host, self.methods = host, methods

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        for method in self.methods:
            loop = vars(method).get("loop")
            if loop is not None:
                memo[id(loop)] = loop
        return Attachment(copy.deepcopy(self.host, memo), copy.deepcopy(self.methods, memo))


class Held:
    """What a model remembers of the Learner on it: names only, so that it keeps no learner alive. Copies are free."""

    def __init__(self, names: list[str]):
        self.names = names

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None


class Original:
    """A model as it was before methods were put into it: which parameters train and the mode of every module.

    Args:
        host: the model; nothing is changed yet.
    """

    def __init__(self, host: Host):
        self.host = host
        self.methods: list[Method] = []
        self._adapters = host.attached()
        # By name: the parameters themselves would live on where the model's are replaced.
        self._trained = {name: parameter.requires_grad for name, parameter in host.model.named_parameters()}
        self._modes = [(module, module.training) for module in host.model.modules()]

    def attach(self, method: Method) -> None:
        """Attaches a method; what it brings is then in the mode of the model, training or evaluation."""
        model = self.host.model
        there = {id(module) for module in model.modules()}
        method.attach(self.host)
        self.methods.append(method)
        own = (module for top in method.modules.values() for module in top.modules())
        for module in (*model.modules(), *own):
            if id(module) not in there:
                module.training = model.training

    def restore(self, half_done: bool = False) -> None:
        """Takes the methods out, last first; with `half_done` also what a method left behind that failed midway."""
        while self.methods:
            self.methods.pop().detach(self.host)
        if half_done:
            self.host.strip(keep=self._adapters)
        for name, parameter in self.host.model.named_parameters():
            # A method that failed midway may have left another name, and its error is the one to be seen.
            parameter.requires_grad_(self._trained.get(name, parameter.requires_grad))
        for module, training in self._modes:
            module.training = training


def attachment(model: nn.Module) -> Attachment | None:
    """What `attach` has put into a model, or None."""
    there = getattr(model, _ATTRIBUTE, None)
    return there if isinstance(there, Attachment) else None


def refuse_taken(model: nn.Module) -> None:
    """Raises BadInput where `attach` or a Learner has put methods into the model."""
    there = getattr(model, _ATTRIBUTE, None)
    if isinstance(there, Held):
        raise BadInput(
            f"model: a Learner with {', '.join(there.names)} holds it already; call that learner's `detach` first, or "
            "load the model again"
        )
    if there is not None:
        names = ", ".join(m.name for m in there.methods)
        raise BadInput(f"model: {names} is attached already; call `detach` first, or attach all methods as one list")


def hold(model: nn.Module, methods: list[Method]) -> Held:
    """Marks the model as a Learner's."""
    held = Held([method.name for method in methods])
    setattr(model, _ATTRIBUTE, held)
    return held


def holds(model: nn.Module, held: Held) -> bool:
    """True until `release`."""
    return getattr(model, _ATTRIBUTE, None) is held


def release(model: nn.Module) -> None:
    """The model is nobody's again."""
    delattr(model, _ATTRIBUTE)


def build_methods(method: Any, field: str = "method") -> list[Method]:
    """Method objects from a name, `{name: settings}`, a Method instance, or a list of these.

    Raises:
        BadInput: a name is unknown or a setting does not fit; or the list is empty.
    """
    from .methods import Method

    items = list(method) if isinstance(method, (list, tuple)) else [method]
    if not items:
        raise BadInput(f"{field}: is empty; name at least one method")
    methods: list[Method] = []
    for item in items:
        if isinstance(item, Method):
            methods.append(item)
            continue
        if isinstance(item, type) and issubclass(item, Method):
            raise BadInput(f"{field}: found the class {item.__name__}; give its name or an instance of it")
        methods += [METHODS.get(name)(config) for name, config in METHODS.parse(item, field)]
    if len({id(m) for m in methods}) < len(methods):
        raise BadInput(f"{field}: the same Method object stands in the list twice; make two")
    return methods


def attach(model: Model, method: Any) -> Model:
    """Puts methods into a model and returns the same object: `generate`, pipelines and `save_pretrained` go on working.

    Adding alone teaches nothing. Growth, masks, projections and proximal steps are run by the Learner and by nothing
    else: a training loop of your own moves the parameters that a method brings, and has to call the method's hooks
    itself.

    Args:
        model: any supported transformers model (see `hosts.Host`); changed in place.
        method: a name, `{name: settings}`, a Method instance, or a list of these. The order of the list is the order
            in which adapters on one module are added.

    Raises:
        BadInput: methods are attached already, or a Learner holds the model; a name, a setting or the model does not
            fit. The model is then as before.
    """
    from .hosts import Host

    host = Host(model)
    refuse_taken(model)
    methods = build_methods(method)
    original = Original(host)
    try:
        for item in methods:
            original.attach(item)
    except BaseException:
        original.restore(half_done=True)
        raise
    setattr(model, _ATTRIBUTE, Attachment(host, methods))
    return model


def detach(model: Model) -> Model:
    """Takes out what `attach` put in, last method first; the model is then the original, bit for bit.

    Raises:
        BadInput: nothing is attached, or what is belongs to a Learner.
    """
    there = attachment(model)
    if there is None and isinstance(getattr(model, _ATTRIBUTE, None), Held):
        raise BadInput("model: a Learner holds it; call that learner's own `detach`")
    if there is None:
        raise BadInput("model: nothing is attached; `attach(model, method)` comes first")
    for method in reversed(there.methods):
        method.detach(there.host)
    release(model)
    return model
