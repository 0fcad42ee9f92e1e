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


def attachment(model: nn.Module) -> Attachment | None:
    """The attachment of a model, or None."""
    return getattr(model, _ATTRIBUTE, None)


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

    Adding alone teaches nothing. Growth, masks, projections and proximal steps are run by the Learner and by the
    trainer callback, and by nothing else: a training loop of your own moves the parameters that a method brings, and
    has to call the method's hooks itself.

    Args:
        model: any supported transformers model (see `hosts.Host`); changed in place.
        method: a name, `{name: settings}`, a Method instance, or a list of these. The order of the list is the order
            in which adapters on one module are added.

    Raises:
        BadInput: methods are attached already; a name, a setting or the model does not fit. The model is then as
            before.
    """
    from .hosts import Host

    host = Host(model)
    there = attachment(model)
    if there is not None:
        names = ", ".join(m.name for m in there.methods)
        raise BadInput(f"model: {names} is attached already; call `detach` first, or attach all methods as one list")
    methods = build_methods(method)
    before = host.attached()
    done: list[Method] = []
    try:
        for item in methods:
            item.attach(host)
            done.append(item)
    except BaseException:
        for item in reversed(done):
            item.detach(host)
        host.strip(keep=before)
        raise
    setattr(model, _ATTRIBUTE, Attachment(host, methods))
    return model


def detach(model: Model) -> Model:
    """Takes out what `attach` put in, last method first; the model is then the original, bit for bit.

    Raises:
        BadInput: nothing is attached.
    """
    there = attachment(model)
    if there is None:
        raise BadInput("model: nothing is attached; `attach(model, method)` comes first")
    for method in reversed(there.methods):
        method.detach(there.host)
    delattr(model, _ATTRIBUTE)
    return model
