"""Which linear map of a transformer block plays which part. Names of modules in, canonical roles out."""

from __future__ import annotations

from torch import Tensor, nn

ATTENTION = ("query", "key", "value", "attention_output")
FFN = ("ffn_in", "ffn_gate", "ffn_out")
ROLES = (*ATTENTION, *FFN)
GROUPS: dict[str, tuple[str, ...]] = {"all": ROLES, "attention": ATTENTION, "ffn": FFN}
OTHER = "other"
"""A linear map whose part is unknown (a router, a head): reached by a pattern or by this name, in no group."""

PREFIX = "perdure_"
"""Submodules that perdure adds to a host are named so, and are never taken for parts of the host."""

_LAST: dict[str, str] = {
    **dict.fromkeys(("query", "q_proj", "q_lin", "to_q", "wq", "q"), "query"),
    **dict.fromkeys(("key", "k_proj", "k_lin", "to_k", "wk", "k"), "key"),
    **dict.fromkeys(("value", "v_proj", "v_lin", "to_v", "wv", "v"), "value"),
    **dict.fromkeys(("o_proj", "out_proj", "out_lin", "to_out", "o"), "attention_output"),
    **dict.fromkeys(("fc1", "lin1", "up_proj", "c_fc", "fc_in", "dense_h_to_4h", "weights_in"), "ffn_in"),
    **dict.fromkeys(("fc2", "lin2", "down_proj", "fc_out", "dense_4h_to_h", "weights_out"), "ffn_out"),
    "gate_proj": "ffn_gate",
}
_FUSED = ("c_attn", "qkv")
"""Projections whose output is query, key and value one after the other, each as wide as the input."""


def is_linear(module: nn.Module) -> bool:
    """True for `nn.Linear` and its quantised kin, for GPT-2's Conv1D, and for PEFT's wrapper around one of these."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    return hasattr(module, "base_layer") and hasattr(module, "in_features") and hasattr(module, "out_features")


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D, a linear map that stores its weight as [d_in, d_out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and not isinstance(module, nn.Conv1d)


def features(module: nn.Module) -> tuple[int, int, bool]:
    """(d_in, d_out, stores its weight transposed) of a module that `is_linear` accepts."""
    if is_conv1d(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.shape[1], True
    transposed = hasattr(module, "base_layer") and is_conv1d(module.base_layer)  # type: ignore[arg-type]
    return int(module.in_features), int(module.out_features), transposed  # type: ignore[arg-type]


def roles_of(relative: str, d_in: int, d_out: int) -> list[tuple[str, tuple[int, int] | None]]:
    """Roles of the linear map at path `relative` inside its block, each with its slice of the output.

    One pair, except for a fused query-key-value projection, which gives three.
    """
    parts = relative.split(".")
    last, before = parts[-1], ".".join(parts[:-1]).lower()
    if "cross" in before or "encdec" in before:
        return [(OTHER, None)]
    if last in _FUSED and d_out == 3 * d_in:
        return [(role, (i * d_in, (i + 1) * d_in)) for i, role in enumerate(("query", "key", "value"))]
    attention = "attn" in before or "attention" in before
    if last in _LAST:
        return [(_LAST[last], None)]
    if last in ("c_proj", "proj"):
        return [("attention_output" if attention else "ffn_out", None)]
    if last == "dense":
        if attention:
            return [("attention_output", None)]
        if "intermediate" in before:
            return [("ffn_in", None)]
        if "output" in before:
            return [("ffn_out", None)]
    return [(OTHER, None)]
