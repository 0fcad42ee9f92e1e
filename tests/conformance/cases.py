"""Tiny hosts, streams and method settings that every check of the battery runs on.

A method joins the battery by standing in `perdure.methods`; it needs a line here only where its defaults are too large
for a tiny host, or where it cannot run alone.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perdure.learner import Learner
from perdure.models import PairProcessor
from perdure.processors import ByteTokenizer, ImageProcessor
from perdure.registry import METHODS
from perdure.streams import Experience

MATRIX: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("matrix.json").read_text())
"""Method -> host -> "runs", or "refused: " and the reason."""
HOSTS = ("bert", "vit", "gpt2", "llama", "clip")
OBJECTIVE = {
    "bert": "classification", "vit": "classification", "gpt2": "causal_lm", "llama": "causal_lm", "clip": "image_text",
}  # fmt: skip

PATCHES = {"patches": 6, "top_k": 2, "rank": 3}
# method name -> what the battery runs instead of its defaults
SETTINGS: dict[str, Any] = {
    "lora": {"lora": {"rank": 2, "dropout": 0.1}},
    "moram": {"moram": {"rank": 2, "top_k": 2, "dropout": 0.1}},
    "apn": {"apn": {**PATCHES, "dropout": 0.1}},
    "codyra": {"codyra": {"rank": 3, "threshold": 0.3, "gate_learning_rate": 0.02}},
    "random_prune": {"random_prune": {"rank": 3, "kept_rank": 1.5}},
    "olora": {"olora": {"rank": 2, "alpha": 4.0, "lambda2": 0.01}},
    "inflora": {"inflora": {"rank": 2, "energy": 0.8}},
    "sd_lora": {"sd_lora": {"rank": 2}},
    "merge_lora": {"merge_lora": {"rank": 2, "dropout": 0.1}},
    "tree_lora": {"tree_lora": {"rank": 2, "alpha": 4.0}},
    "er": {"er": {"budget": 12, "per_step": 4}},
    "derpp": {"derpp": {"budget": 12, "per_step": 4}},
    "agem": {"agem": {"budget": 12, "per_step": 6}},
    "pcr": {"pcr": {"budget": 12, "per_step": 4}},
    "moe_adapters": {"moe_adapters": {"experts": 2, "rank": 4, "noise": True, "dropout": 0.1}},
    "seta": {"seta": {"density": 0.05, "gate_layer": 1, "prompt_tokens": 4, "draws": 8, "smallest": 4}},
    "ewc": {"ewc": {"strength": 10.0, "rows": 4}},
    "l2_anchor": {"l2_anchor": {"strength": 0.1}},
    "l2p": {"l2p": {"size": 4, "length": 2, "top_n": 2, "prompt_tokens": 4}},
    "dual_prompt": {
        "dual_prompt": {
            "general_length": 2,
            "general_layers": [0],
            "expert_length": 2,
            "expert_layers": [1],
            "prompt_tokens": 4,
        }
    },
    "coda_prompt": {"coda_prompt": {"components": 2, "length": 4, "orthogonality": 0.1, "prompt_tokens": 4}},
    "single_prompt": {"single_prompt": {"length": 3}},
    "joint": [{"lora": {"rank": 2}}, "joint"],
}
# nothing trains before the last experience, or ever: there is no state from the middle of the second
WITHOUT_A_MIDDLE = ("joint", "frozen")
# further settings of a method that are conformance cases of their own
VARIANTS: dict[str, Any] = {
    "moram-protected": {"moram": {"rank": 2, "top_k": 2, "protect": {"inputs": 0.5}}},
    "moram-contrast": {"moram": {"rank": 2, "top_k": 2, "keys": "contrast"}},
    "moram-limited": {"moram": {"rank": 2, "top_k": 2, "max_atoms": 4}},
    "lora-protected": {"lora": {"rank": 2, "protect": {"inputs": 0.5}}},
    "codyra-l1+er": [
        {"codyra": {"rank": 3, "l1": 20.0, "operator": "released"}},
        {"er": {"budget": 12, "per_step": 4}},
    ],
    "moram+er": [{"moram": {"rank": 2, "top_k": 2}}, {"er": {"budget": 12, "per_step": 4}}],
    "lora+derpp": [{"lora": {"rank": 2}}, {"derpp": {"budget": 12, "per_step": 4}}],
    "moe_adapters-freezing": {"moe_adapters": {"experts": 4, "rank": 3, "noise": True, "freeze": 1, "dropout": 0.1}},
    "lora+pcr-holistic": [{"lora": {"rank": 2}}, {"pcr": {"budget": 12, "per_step": 4, "holistic": {}}}],
    "apn-in-place": {"apn": {**PATCHES, "place": "replace", "train": "patches+prototypes", "pretrain": {}}},
    "apn-everything": {"apn": {**PATCHES, "train": "all", "row_wise": False}},
    "lora-pretrained": {"lora": {"rank": 2, "pretrain": {"weight_decay": 0.1}}},
    "sd_lora-per-map": {"sd_lora": {"rank": 2, "magnitudes": "per_map"}},
    "tree_lora-released": {"tree_lora": {"rank": 2, "alpha": 4.0, "form": "released"}},
    "rwf-all": {"rwf": {"length": 3, "heads": 2, "beta": 2.0, "train": ["P", "W_Q", "W_K", "W_V", "W_O"]}},
    "lora+ewc": [{"lora": {"rank": 2, "dropout": 0.1}}, {"ewc": {"strength": 10.0, "online": True, "labels": "data"}}],
    "lora+l2-attention": [
        {"l2_anchor": {"strength": 0.1, "where": "attention", "head": True, "from_start": True}},
        {"lora": {"rank": 2}},
    ],
    "codyra+ewc": [{"ewc": {"strength": 10.0, "rows": 4}}, {"codyra": {"rank": 3, "threshold": 0.3}}],
    "moram+lwf": [{"moram": {"rank": 2, "top_k": 2}}, "lwf"],
    "moram-growing": {"moram": {"rank": 2, "top_k": 2, "dropout": 0.1, "grow_every": 3}},  # without boundaries
}


def build_host(
    name: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0, pooler: bool = False
) -> tuple[torch.nn.Module, Any]:
    """A fresh tiny model with weights that depend on its name alone, and its processor; `pooler` for BERT alone."""
    import transformers as t

    torch.manual_seed(11)
    text = {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    if name == "bert":
        model: Any = t.BertModel(
            t.BertConfig(
                **text, max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
            ),
            add_pooling_layer=pooler,
        )
    elif name == "vit":
        config = t.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
            patch_size=4,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        model = t.ViTModel(config, add_pooling_layer=False)
    elif name == "clip":
        tower = {**text, "projection_dim": 8, "attention_dropout": dropout}
        del tower["vocab_size"]
        model = t.CLIPModel(
            t.CLIPConfig(
                text_config={
                    **tower, "vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": 257, "eos_token_id": 258,
                },
                vision_config={**tower, "hidden_size": 32, "image_size": 8, "patch_size": 4},
                projection_dim=8,
            )
        )  # fmt: skip
    elif name == "gpt2":
        model = t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=dropout, embd_pdrop=dropout,
                attn_pdrop=dropout, bos_token_id=257, eos_token_id=258,
            )
        )  # fmt: skip
    else:
        model = t.LlamaForCausalLM(
            t.LlamaConfig(**text, num_key_value_heads=1, max_position_embeddings=64, attention_dropout=dropout)
        )
    images = ImageProcessor(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    processors = {"vit": images, "clip": PairProcessor(ByteTokenizer(), images)}
    return model.to(dtype).eval(), processors.get(name) or ByteTokenizer()


def _row(host: str, label: int, draw: random.Random) -> dict[str, Any]:
    if host in ("vit", "clip"):
        noise = np.random.default_rng(draw.randrange(2**31)).integers(0, 60, (8, 8, 3))
        noise[..., label % 3] += 120 + 20 * (label // 3)
        return {"image": noise.clip(0, 255).astype(np.uint8), "label": f"class{label}"}
    text = "abcdefghijklmnopqrstuvwxyz"[label] * draw.randint(3, 8) + draw.choice("xyz")
    return {"text": text, "label": f"class{label}"} if host == "bert" else {"text": text + " " + text}


def experiences(host: str, count: int = 3, rows: int = 12) -> list[Experience]:
    draw = random.Random(5)
    made = []
    for index in range(count):
        every = [_row(host, index * 2 + number % 2, draw) for number in range(rows + 6)]
        made.append(Experience(index, f"e{index}", train=every[:rows], test=every[rows:], last=index == count - 1))
    return made


def build_learner(
    host: str,
    method: Any,
    *,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    head: Any = None,
    pooler: bool = False,
    **training: Any,
) -> Learner:
    model, processor = build_host(host, dtype, dropout, pooler)
    limit = {"bert": {"max_length": 32}, "vit": {}, "clip": {"max_length": 32}}.get(host, {"block_size": 32})
    objective: Any = {OBJECTIVE[host]: limit}
    settings = {
        "learning_rate": 1e-2, "head_learning_rate": 1e-2, "per_device_train_batch_size": 4, "epochs": 2,
        "logging_steps": 2,
    }  # fmt: skip
    boundaries = "none" if "grow_every" in str(method) else "train"
    return Learner(
        model, processor, method=method, head=head, objective=objective, training={**settings, **training},
        protocol={"rehearsal": 12, "mask": "seen", "boundaries": boundaries}, seed=3,
    )  # fmt: skip


def build_a_report(learner: Learner, matrix: list[list[float | None]], folder: Path) -> None:
    """report.json and report.html of what this learner has learnt."""
    from perdure.report.build import build_report, read_report, write_json
    from perdure.report.html import render_run

    settings = learner.settings()
    report = build_report(
        name="battery", method="+".join(m.name for m in learner.methods),
        head=learner.head.name if learner.head else None,
        model="tiny", stream="tiny", objective=learner.objective.name, metric=learner.objective.metric,
        higher_is_better=learner.objective.higher_is_better, seed=learner.seed, protocol=settings["protocol"],
        training=settings["training"], details={
            "method": [{**facts, "config": m.config.model_dump(mode="json")}
                       for facts, m in zip(learner.describe()["details"], learner.methods, strict=True)],
            "head": settings["head"],
        },
        matrix=matrix, baseline=None, status="complete", router=learner.services.router_log.summary(),
        cost={"seconds": learner.counters.seconds, "trainable_parameters": learner.trainable_parameters(),
              "stored_bytes": learner.stored_bytes()},
    )  # fmt: skip
    write_json(folder / "report.json", report)
    render_run(read_report(folder / "report.json"), folder / "report.html")


def outputs(learner: Learner, made: list[Experience]) -> torch.Tensor:
    """Logits of the test rows of all experiences, in evaluation mode, flattened."""
    parts = []
    with torch.no_grad():
        for experience in made:
            for batch in learner.batches(experience.test, unlabelled=True):
                logits = learner.forward(batch).logits
                assert logits is not None
                parts.append(logits.double().flatten())
    return torch.cat(parts)


def host_inputs(host: str, learner: Learner, made: list[Experience]) -> dict[str, torch.Tensor]:
    """What the bare host takes of the first test rows; both towers of CLIP want something."""
    inputs = next(iter(learner.batches(made[0].test, unlabelled=True))).inputs
    if host == "clip":
        inputs["input_ids"] = torch.tensor([[257, 97, 98, 99, 258], [257, 120, 258, 256, 256]])
    return inputs


def all_specs() -> dict[str, Any]:
    """Every registered method and variant, by the name the battery calls it."""
    return {name: SETTINGS.get(name, name) for name in METHODS.names()} | VARIANTS


def runs(method: str, host: str) -> bool:
    return MATRIX.get(method, {}).get(host) == "runs"


def without_dropout(spec: Any) -> Any:
    """The settings with every random draw of a forward pass off, those that are on by default included."""
    off = {"dropout": 0.0, "noise": False}
    return [
        {
            name: config.model_dump(exclude_unset=True)
            | {key: off[key] for key in off if key in type(config).model_fields}
        }
        for name, config in METHODS.parse(spec, "method")
    ]
