"""Checkpoints, locks and all that a run needs to go on as if it had never stopped. Never pickle: safetensors and JSON.

| module | holds |
|---|---|
| `store` | `StateStore`: atomic, checksummed, pruned checkpoints |
| `schema` | schema number, migrations |
| `tensors`, `values` | bytes of tensors, `model_hash`; strict JSON |
| `files` | durable writing, one mapping of disk errors, append-only logs |
| `lock` | `RunLock`: one run per folder |
| `rng`, `optimizer`, `environment` | what a run's next float depends on |
"""

from perdure.errors import CannotWrite, DamagedState
from perdure.state.environment import environment, environment_differences, perdure_commit
from perdure.state.files import append_line, atomic_write_text, truncate
from perdure.state.lock import RunLock
from perdure.state.optimizer import load_optimizer_state, optimizer_state
from perdure.state.rng import generator_state, rng_state, set_generator_state, set_rng_state
from perdure.state.schema import SCHEMA, migrate
from perdure.state.store import Entry, State, StateStore, StateWarning
from perdure.state.tensors import model_hash
from perdure.state.values import decode_values, encode_values

__all__ = [
    "SCHEMA",
    "CannotWrite",
    "DamagedState",
    "Entry",
    "RunLock",
    "State",
    "StateStore",
    "StateWarning",
    "append_line",
    "atomic_write_text",
    "decode_values",
    "encode_values",
    "environment",
    "environment_differences",
    "generator_state",
    "load_optimizer_state",
    "migrate",
    "model_hash",
    "optimizer_state",
    "perdure_commit",
    "rng_state",
    "set_generator_state",
    "set_rng_state",
    "truncate",
]
