"""Tiny random hosts of every family, built from config classes: hidden 32, 2 blocks, 50 tokens, images of 8 x 8."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

WIDTH, DEPTH, VOCAB, HEADS = 32, 2, 50, 4
_BLOCKS = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 64}
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE = {"image_size": 8, "patch_size": 4}
_DECODER = {**_BLOCKS, **_TOKENS, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
_DECODER["tie_word_embeddings"] = False  # tied random weights repeat the last token for ever
_MIXED = ["sliding_attention", "full_attention"]
_GPT2 = {**_TOKENS, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "n_positions": 64}
_DISTIL = {"vocab_size": VOCAB, "pad_token_id": 0, "dim": WIDTH, "n_layers": DEPTH, "n_heads": HEADS, "hidden_dim": 64}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**_BLOCKS, "vocab_size": VOCAB, "pad_token_id": 0}),
    "roberta": ("RobertaConfig", {**_BLOCKS, **_TOKENS, "max_position_embeddings": 64}),
    "distilbert": ("DistilBertConfig", _DISTIL),
    "vit": ("ViTConfig", {**_BLOCKS, **_IMAGE}),
    "deit": ("DeiTConfig", {**_BLOCKS, **_IMAGE}),
    "dinov2": ("Dinov2Config", {**_BLOCKS, **_IMAGE}),
    "clip_text": ("CLIPTextConfig", {**_BLOCKS, **_TOKENS}),
    "clip_vision": ("CLIPVisionConfig", {**_BLOCKS, **_IMAGE}),
    "gpt2": ("GPT2Config", _GPT2),
    "llama": ("LlamaConfig", _DECODER),
    "qwen2": ("Qwen2Config", {k: v for k, v in _DECODER.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", _DECODER),
    "gemma": ("GemmaConfig", _DECODER),
    "gemma2": ("Gemma2Config", {**_DECODER, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**_DECODER, "sliding_window": 4, "layer_types": _MIXED}),
}  # fmt: skip

MODELS = {
    "BertModel": "bert", "BertForSequenceClassification": "bert", "RobertaModel": "roberta",
    "DistilBertModel": "distilbert", "ViTModel": "vit", "ViTForImageClassification": "vit", "DeiTModel": "deit",
    "Dinov2Model": "dinov2", "CLIPTextModel": "clip_text", "CLIPVisionModel": "clip_vision", "CLIPModel": "clip",
    "GPT2Model": "gpt2", "GPT2LMHeadModel": "gpt2", "LlamaModel": "llama", "LlamaForCausalLM": "llama",
    "Qwen2Model": "qwen2", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3", "Gemma3TextModel": "gemma3",
}  # fmt: skip


@functools.cache
def _transformers() -> Any:
    import transformers

    return transformers


def build(model: str, attention: str = "sdpa", seed: int = 0, **changes: Any) -> nn.Module:
    """A fresh random model in evaluation mode. Weights are larger than the default so that attention matters."""
    transformers = _transformers()
    family = MODELS[model]
    if family == "clip":
        text, vision = CONFIGS["clip_text"][1], {**CONFIGS["clip_vision"][1], "hidden_size": 48}
        config = transformers.CLIPConfig(text_config=dict(text), vision_config=vision, projection_dim=16)
    else:
        kind, settings = CONFIGS[family]
        config = getattr(transformers, kind)(**{**settings, **changes})
    config._attn_implementation = "eager" if family == "gemma2" else attention  # soft-capping: no sdpa
    torch.manual_seed(seed)
    host = getattr(transformers, model)(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return host


def inputs(model: str, batch: int = 2, tokens: int = 7, seed: int = 3) -> dict[str, torch.Tensor]:
    """Inputs without a mask for a model of `MODELS`."""
    generator = torch.Generator().manual_seed(seed)
    family = MODELS[model]
    made: dict[str, torch.Tensor] = {}
    if family in ("vit", "deit", "dinov2", "clip_vision", "clip"):
        made["pixel_values"] = torch.randn(batch, 3, 8, 8, generator=generator)
    if family not in ("vit", "deit", "dinov2", "clip_vision"):
        made["input_ids"] = torch.randint(5, VOCAB, (batch, tokens), generator=generator)
    return made


def result(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    """Hidden states, logits or both CLIP embeddings of one forward pass, without a gradient."""
    with torch.no_grad():
        output = model(**kwargs)
    if "image_embeds" in output:
        return torch.cat((output.image_embeds, output.text_embeds), dim=-1)
    return output.logits if "logits" in output else output.last_hidden_state


class Bias(nn.Module):
    """An adapter that learns: x W with a fixed random W."""

    def __init__(self, d_in: int, d_out: int, seed: int = 0, scale: float = 0.3):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(d_out, d_in, generator=generator) * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()
