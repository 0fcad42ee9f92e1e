"""States of the random number generators that a run may draw from."""

from __future__ import annotations

import random
import warnings
from typing import Any

import torch
from torch import Tensor

from perdure.errors import DamagedState
from perdure.state.store import StateWarning

_CPU, _CUDA = "rng.torch", "rng.cuda."


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Global generators of Python, NumPy (legacy), torch on the CPU and, once CUDA is in use, on every CUDA device.

    Returns:
        tensors `rng.torch`, `rng.cuda.0`, ... (uint8) and JSON values, for a `StateStore` and `set_rng_state`.
    """
    import numpy

    version, words, gauss = random.getstate()
    tensors = {_CPU: torch.get_rng_state()}
    if torch.cuda.is_initialized():  # asking earlier would open a context on every device
        tensors |= {f"{_CUDA}{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    values = {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": _plain(numpy.random.get_state(legacy=False)),
    }
    return tensors, values


def set_rng_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Sets what `rng_state` returned; other entries of `tensors` are ignored.

    Warns:
        StateWarning: a CUDA device of the saved run is not there.

    Raises:
        DamagedState: an entry is missing.
    """
    import numpy

    try:
        python, legacy, cpu = values["python"], values["numpy"], tensors[_CPU]
    except KeyError as error:
        raise DamagedState(f"the state has no random number generator entry {error}; it cannot be resumed") from error
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    numpy.random.set_state(_unplain(legacy))
    torch.set_rng_state(cpu)
    for name, state in tensors.items():
        if name.startswith(_CUDA):
            index = int(name.removeprefix(_CUDA))
            if index < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, index)
            else:
                message = f"the generator of CUDA device {index} is in the state, but that device is not here"
                warnings.warn(message, StateWarning, stacklevel=2)


def generator_state(generator: torch.Generator) -> Tensor:
    """The whole state of one torch generator, uint8 on the CPU; set it with `set_generator_state`."""
    return generator.get_state().clone()


def set_generator_state(generator: torch.Generator, state: Tensor) -> None:
    """Sets a generator of the same device type to what `generator_state` returned."""
    try:
        generator.set_state(state)
    except RuntimeError as error:
        raise DamagedState(f"a state of {state.numel()} bytes does not fit a {generator.device} generator") from error


def _plain(value: Any) -> Any:
    import numpy

    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, numpy.ndarray):
        return {"dtype": str(value.dtype), "words": value.tolist()}
    return value.item() if isinstance(value, numpy.generic) else value


def _unplain(value: Any) -> Any:
    import numpy

    if isinstance(value, dict):
        if value.keys() == {"dtype", "words"}:
            return numpy.array(value["words"], dtype=value["dtype"])
        return {key: _unplain(item) for key, item in value.items()}
    return value
