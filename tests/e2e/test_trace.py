"""The recipe of TRACE: its settings against the published ones, and a run of it on tiny models with real rows."""

from __future__ import annotations

import json

import pytest

from perdure.recipe import load_recipe

# What MoRAM's released script and code set for TRACE, typed from the notes on the release.
PUBLISHED = {
    "rank": 8, "top_k": 8, "temperature": 0.03, "threshold": 0.2, "scale": 2.0, "dropout": 0.1, "eps": 1e-8,
    "targets": "attention",
    "optimizer": "adamw", "learning_rate": 5e-4, "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.0,
    "lr_scheduler": "constant", "warmup_steps": 0, "max_grad_norm": 1.0, "epochs": [2, 1, 3, 2, 1, 2, 2, 3],
    "model": "google/gemma-2b-it", "seed": 1234,
    "max_prompt": 1024, "max_answer": 512, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3,
}  # fmt: skip
SCORERS = {
    "c_stance": "prefix", "fomc": "prefix", "meetingbank": "rouge_l", "py150": "edit_similarity",
    "scienceqa": "first_character", "numglue_cm": "number", "numglue_ds": "number", "20minuten": "sari",
}  # fmt: skip
TASKS = [name for name in SCORERS if name != "meetingbank"]  # what the shared data holds of TRACE


@pytest.mark.parametrize("arm", [None, "moram"])
def test_the_recipe_holds_the_published_settings(arm):
    recipe = load_recipe("papers/trace", arm=arm)
    ((method, settings),) = recipe.method[0].items()
    objective = recipe.objective["instruction"]
    found = {
        **settings, **recipe.training.model_dump(), **objective, "model": recipe.model, "seed": recipe.seed,
    }  # fmt: skip
    assert method == "moram" and {name: found[name] for name in PUBLISHED} == PUBLISHED
    training = recipe.training
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 32
    # In TRACE's order, each with its own scorer.
    assert objective["scorers"] == SCORERS and list(objective["scorers"]) == list(SCORERS)
    assert [source.path for source in recipe.stream.sources] == [f"data/trace/{name}.jsonl" for name in SCORERS]
    protocol = recipe.protocol
    assert (protocol.task_id, protocol.rehearsal, protocol.boundaries) == ("none", 0, "train")


def test_the_lora_arm_holds_the_settings_of_trace():
    recipe = load_recipe("papers/trace", arm="lora")
    assert recipe.method == [{"lora": {**recipe.method[0]["lora"], "rank": 8, "alpha": 32.0, "dropout": 0.1}}]
    assert recipe.method[0]["lora"]["targets"] == ["query", "value"] and recipe.training.learning_rate == 1e-4
    assert recipe.training.epochs == [5, 3, 7, 5, 3, 5, 5, 7]


def tiny_model(folder, family):
    """A random model of an architecture that TRACE was run on, and a tokenizer, as `from_pretrained` finds them."""
    import torch
    import transformers

    from perdure.processors import ByteTokenizer

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 259, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 96, "bos_token_id": 257,
        "eos_token_id": 258, "pad_token_id": 256,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)


@pytest.mark.needs_data
@pytest.mark.parametrize(("arm", "family"), [("moram", "Gemma"), ("lora", "Llama"), ("moram", "Qwen3")])
def test_it_runs_on_real_rows_and_a_tiny_model(arm, family, tmp_path, nursery):
    tiny_model(tmp_path / "tiny", family)
    done = nursery.run(
        tmp_path, "run", "trace", f"method={arm}", "model=./tiny",
        f"stream.source=[{', '.join(f'trace500/{name}' for name in TASKS)}]",
        "stream.rows_per_experience=4", "stream.test_rows_per_experience=2",
        "objective.instruction.max_prompt=64", "objective.instruction.max_answer=16",
        "training.epochs=[1, 1, 1, 1, 1, 1, 2]", "training.gradient_accumulation_steps=4", "training.bf16=false",
        "training.num_threads=1", "output_dir=out", "--no-progress",
    )  # fmt: skip
    assert done.code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert (report["metric"], report["higher_is_better"], report["objective"]) == ("score", True, "instruction")
    matrix = report["matrix"]
    assert len(matrix) == 7 and all(
        (cell is None) == (j > i) for i, row in enumerate(matrix) for j, cell in enumerate(row)
    )
    assert all(0 <= cell <= 1 for row in matrix for cell in row if cell is not None)
    assert report["details"]["stream"]["experiences"] == TASKS
    # A model from scratch writes no right letter; what it leaves out of a text counts for SARI all the same.
    assert matrix[6][TASKS.index("20minuten")] > 0
    assert report["cost"]["steps"] == 8  # one a task, two for the last
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Score in per cent" in page


def test_a_list_of_passes_that_is_too_short_is_refused(tmp_path, nursery):
    rows = [{"prompt": f"{n}?", "answer": str(n)} for n in range(4)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = nursery.run(
        tmp_path, "run", "trace", "model={scratch: {family: llama, layers: 1, width: 16, heads: 2, max_length: 96}}",
        "stream.source=[a.jsonl, b.jsonl]", "objective.instruction.max_prompt=16", "objective.instruction.max_answer=4",
        "training.epochs=[1]", "output_dir=out", "--no-progress",
    )  # fmt: skip
    assert done.code == 64 and "training.epochs: lists 1 numbers, and the stream has 2 experiences" in done.output
    assert not (tmp_path / "out").exists()
    done = nursery.run(tmp_path, "run", "trace", "training.epochs=[1, 0]", "output_dir=out")
    assert done.code == 64 and done.output.startswith("perdure: training.epochs: give one number, or one for each")


def test_a_scorer_for_no_experience_is_named(tmp_path, nursery):
    rows = [{"prompt": f"{n}?", "answer": str(n)} for n in range(2)]
    for name in ("sums", "dates"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = nursery.run(
        tmp_path, "run", "trace", "model={scratch: {family: llama, layers: 1, width: 16, heads: 2, max_length: 96}}",
        "stream.source=[{path: sums.jsonl, test: sums.jsonl}, dates.jsonl]", "objective.instruction.max_prompt=16",
        "objective.instruction.max_answer=4", "objective.instruction.scorers={summs: number}", "training.epochs=1",
        "training.bf16=false", "output_dir=out", "--no-progress",
    )  # fmt: skip
    assert done.code == 0, done.output
    said = "scorers: no experience is named summs; there are sums, dates"
    assert said in " ".join(done.output.split())
