"""Image-text contrast on CLIP: the loss against hand-worked numbers and a plain reference, class texts, captions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from perdure.data import Batch, Output
from perdure.errors import BadInput
from perdure.learner import Learner
from perdure.methods import Method, register
from perdure.models import PairProcessor
from perdure.objectives.contrastive import ImageText
from perdure.processors import ByteTokenizer, ImageProcessor
from perdure.registry import METHODS, OBJECTIVES
from perdure.streams import Experience
from tests.conformance import cases

BOTH = PairProcessor(ByteTokenizer(), ImageProcessor((8, 8)))
MORAM = {"moram": {"rank": 2, "top_k": 2}}


def objective(**settings: Any) -> ImageText:
    ((_, config),) = OBJECTIVES.parse({"image_text": {"max_length": 32, **settings}}, "objective")
    return ImageText(config)


def learner(method: Any = None, classes: list[str] | None = None, protocol: Any = None, **training: Any) -> Learner:
    model, processor = cases.build_host("clip")
    settings = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1} | training
    return Learner(
        model, processor, method=method or MORAM, objective={"image_text": {"max_length": 32}}, classes=classes,
        training=settings, protocol={"rehearsal": 12} | (protocol or {}),
    )  # fmt: skip


# ---- the loss
def test_the_loss_of_a_hand_worked_batch():
    """Three images, class 0 from an earlier experience, s = 2."""
    logits = 2 * torch.tensor([[1, 0], [0, 1], [1, 0.0]]) @ torch.tensor([[1, 0], [0, 1], [-1, 0.0]]).T
    labels = torch.tensor([1, 1, 2])
    allowed = torch.tensor([False, True, True])
    summed, count = objective().loss(Batch({}, labels), Output(logits=logits), allowed)
    # Images to texts, without class 0: log(1 + e^-2) twice, and log(1 + e^-2) + 2.
    to_texts = (3 * math.log(1 + math.exp(-2)) + 2) / 3
    # Texts to images: class 0 has no image; class 1 sees (0, 2, 0) and has images 0, 1; class 2 (-2, 0, -2), image 2.
    one = 2 * math.log(2 + math.exp(2)) - 2
    two = math.log(1 + 2 * math.exp(-2)) + 2
    assert int(count) == 3
    assert float(summed / count) == pytest.approx(to_texts + (one + two) / 3, abs=1e-6)
    assert float(summed / count) == pytest.approx(2.366473, abs=1e-6)


def plain(scores: torch.Tensor, labels: list[int], allowed: torch.Tensor) -> torch.Tensor:
    """The same loss, one term at a time: scores [B, C], allowed [B, C]."""
    images, classes = scores.shape
    to_texts, to_images = [], []
    for j in range(images):
        among = torch.stack([scores[j, c] for c in range(classes) if allowed[j, c]])
        to_texts.append(among.exp().sum().log() - scores[j, labels[j]])
    for c in range(classes):
        total = torch.zeros((), dtype=scores.dtype)
        for j in range(images):
            if labels[j] == c:
                total = total + scores[:, c].exp().sum().log() - scores[j, c]
        to_images.append(total)
    return sum(to_texts, torch.zeros(())) / images + sum(to_images, torch.zeros(())) / classes


@pytest.mark.parametrize("rehearsed", [False, True])
def test_the_loss_is_the_plain_one_in_values_and_gradients(rehearsed):
    torch.manual_seed(2)
    scores = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels = [2, 4, 2, 3, 3, 0 if rehearsed else 4]
    allowed = torch.tensor([False, False, True, True, True]).expand(6, 5).clone()
    allowed[5] |= rehearsed
    expected = plain(scores, labels, allowed)
    (wanted,) = torch.autograd.grad(expected, scores)
    # A row that fills a process up counts in neither term.
    filled = torch.cat([scores, torch.full((1, 5), 9.0, dtype=torch.float64)])
    batch = Batch({}, torch.tensor([*labels, -100]))
    summed, count = objective().loss(batch, Output(logits=filled), torch.cat([allowed, allowed[:1]]))
    (found,) = torch.autograd.grad(summed / count, scores)
    assert int(count) == 6 and summed.dtype == torch.float64
    assert torch.allclose(summed / count, expected, atol=1e-12, rtol=0)
    assert torch.allclose(found, wanted, atol=1e-12, rtol=0) and wanted.abs().max() > 0.01


def test_the_second_term_fades_as_classes_come():
    """Its mean is over all classes learnt, those without an image included."""
    few, many = torch.randn(4, 2), 40
    batch, allowed = Batch({}, torch.tensor([0, 1, 0, 1])), torch.tensor([True, True])
    both, n = objective().loss(batch, Output(logits=few), allowed)
    first = torch.nn.functional.cross_entropy(few, batch.labels)
    wide = torch.cat([few, torch.zeros(4, many - 2)], dim=1)
    faded, _ = objective().loss(batch, Output(logits=wide), torch.arange(many) < 2)
    assert float(faded / n - first) == pytest.approx(float(both / n - first) * 2 / many, rel=1e-4)


# ---- the host
def test_embeddings_scores_and_the_captions_loss_are_those_of_transformers():
    model, processor = cases.build_host("clip", torch.float64)
    rows = [{"image": row["image"], "text": f"{'ab' * n} x"} for n, row in enumerate(cases.experiences("clip")[0].test)]
    made = objective()
    batch = made.collate(made.encode(rows, processor), rows)
    batch.inputs["pixel_values"] = batch.inputs["pixel_values"].double()
    theirs = model(**batch.inputs, return_loss=True)
    ours = made.forward(model, None, batch)
    assert ours.features is not None and ours.other_features is not None and ours.logits is None
    assert torch.allclose(ours.features, theirs.image_embeds, atol=1e-12)
    assert torch.allclose(ours.other_features, theirs.text_embeds, atol=1e-12)
    summed, count = made.loss(batch, ours)
    assert int(count) == 6
    assert torch.allclose(summed / count, 2 * theirs.loss, atol=1e-10, rtol=0)
    without = replace(batch, labels=torch.tensor([0, 0, 0, 0, 0, -100]))
    fewer = made.loss(without, ours)
    cut = {name: tensor[:5] for name, tensor in batch.inputs.items()}
    assert torch.allclose(fewer[0] / fewer[1], 2 * model(**cut, return_loss=True).loss, atol=1e-10, rtol=0)


def test_class_scores_are_scaled_cosines_with_the_texts():
    done = learner()
    made = cases.experiences("clip")
    done.learn(made[0])
    rows = made[0].test
    with torch.no_grad():
        found = done.forward(next(done.batches(rows, unlabelled=True))).logits
        images = torch.stack([torch.from_numpy(done.processor.image_processor(row["image"])) for row in rows])
        texts = [[257, *f"a photo of a {name}.".encode(), 258] for name in done.seen]
        theirs = done.model(pixel_values=images, input_ids=torch.tensor(texts))
    assert found is not None and torch.allclose(found, theirs.logits_per_image, atol=1e-5)
    assert done.predict(rows) == [done.seen[n] for n in theirs.logits_per_image.argmax(-1).tolist()]


# ---- training
def test_moram_learns_with_both_towers():
    done = learner(epochs=10, learning_rate=2e-2)
    made = cases.experiences("clip", 2, rows=16)
    assert {site.tower for site in done.methods[0]._sites} == {"vision", "text"}
    done.learn(made[0])
    values = {name: memory.bank.values().abs().sum() for name, memory in done.methods[0].memories.items()}
    assert len(values) == 24 and min(values.values()) > 0
    assert done.evaluate(made[:1])[0] > 0.7  # chance is one half


def gradient_of(done: Learner, columns: list[int], batch: Batch) -> dict[str, float]:
    output = done.system(batch, True)
    named = done.named_trainable()
    found = torch.autograd.grad(output.logits[:, columns].square().sum(), [p for _, p in named], allow_unused=True)
    sums: dict[str, float] = {}
    for (name, _), gradient in zip(named, found, strict=True):
        tower = "text" if "text" in name else "vision"
        sums[tower] = sums.get(tower, 0.0) + (0.0 if gradient is None else float(gradient.abs().sum()))
    return sums


def test_texts_of_earlier_classes_stand_still_while_current_ones_move():
    done = learner(epochs=2)
    made = cases.experiences("clip")
    done.learn(made[0])
    before = done.objective.class_features(done.model, done.head).detach()  # type: ignore[attr-defined]
    held, seen = [], []

    def on_step(loop, _):
        held.append(loop.head.module.still.clone())
        with torch.no_grad():
            view = loop.head.in_training()
            seen.append(loop.objective.class_features(loop.model, view))
        if loop.position.step == 3:
            batch = next(iter(loop.batches(made[1].train)))
            with torch.enable_grad():
                assert gradient_of(loop, [0, 1], batch)["text"] == 0.0 < gradient_of(loop, [0, 1], batch)["vision"]
                assert gradient_of(loop, [2, 3], batch)["text"] > 0.0

    done.learn(made[1], on_step=on_step)
    assert len(held) == 6 and all(torch.equal(one, held[0]) for one in held)
    assert torch.allclose(held[0][:2], before, atol=1e-6)  # as they were when the experience began
    assert all(torch.equal(one[:2], held[0][:2]) for one in seen)
    assert not torch.allclose(seen[0][2:], seen[-1][2:], atol=1e-4)
    after = done.objective.class_features(done.model, done.head)  # type: ignore[attr-defined]
    assert not torch.allclose(after[:2], before, atol=1e-4)  # prediction encodes them anew


@pytest.mark.parametrize(("method", "current"), [("joint", [0, 1, 2, 3]), (None, [2, 3])])
def test_joint_training_holds_no_text_still(method, current):
    done = learner([{"lora": {"rank": 2}}, "joint"] if method else None)
    for experience in cases.experiences("clip", 2):
        done.learn(experience)
    assert done.head.current == current  # type: ignore[union-attr]


def test_the_temperature_stands_still_when_all_else_trains():
    done = learner("finetune")
    before = {name: p.detach().clone() for name, p in done.model.named_parameters()}
    done.learn(cases.experiences("clip")[0])
    still = [name for name, p in done.model.named_parameters() if torch.equal(p, before[name])]
    assert still == ["logit_scale"]


def test_an_evaluation_encodes_the_class_texts_once(monkeypatch):
    done = learner(per_device_eval_batch_size=2)
    made = cases.experiences("clip")
    done.learn(made[0])
    calls = []
    text = done.objective.text_features  # type: ignore[attr-defined]
    monkeypatch.setattr(done.objective, "text_features", lambda *inputs: calls.append(1) or text(*inputs))
    done.evaluate(made[:1])
    assert len(made[0].test) == 6 and calls == [1] and done.head.ready is None  # type: ignore[union-attr]
    done.predict(made[0].test)
    assert calls == [1, 1]


def test_protected_keys_see_the_texts_of_each_class_once():
    done = learner({"moram": {"rank": 2, "top_k": 2, "protect": {"inputs": 0.5}}})
    made = cases.experiences("clip")
    done.learn(made[0])
    moments = done.methods[0].tensors
    assert {name.split("/")[1].split(".")[0] for name in moments} == {"vision", "text"}
    model = done.model
    caught = []
    hook = model.text_model.encoder.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, inputs: caught.append(inputs[0].detach())
    )
    with torch.no_grad():
        done.objective.class_features(model, done.head)  # type: ignore[attr-defined]
    hook.remove()
    x = caught[0].flatten(0, 1)
    assert torch.allclose(moments["moment/text.0.query"], x.T @ x, rtol=1e-4, atol=1e-4)


def test_the_router_is_observed_in_both_towers_without_padding():
    from perdure.memory.observe import RouterLog

    done = learner()
    made = cases.experiences("clip")
    done.learn(made[0])
    log = RouterLog()
    done.observe(made[0].test, log)
    tokens = {site: facts["tokens"] for site, facts in log.summary().items()}
    assert tokens["vision.0.query"] == 6 * 5  # patches and the class token
    assert tokens["text.0.query"] == 2 * len("<a photo of a class0.>") and len(tokens) == 24


# ---- the label space
ALL = [f"class{number}" for number in range(6)]


def test_a_declared_label_space_scores_classes_that_were_not_learnt():
    done = learner(classes=ALL, protocol={"label_space": "declared"})
    made = cases.experiences("clip")
    zero = done.evaluate(made)  # before anything was learnt
    assert set(done.predict(made[0].test)) <= set(ALL) and done.class_names == ALL
    done.learn(made[1])
    assert done.seen == ["class2", "class3"]
    assert done.class_names == ["class2", "class3", "class0", "class1", "class4", "class5"]
    with torch.no_grad():
        images = torch.stack([torch.from_numpy(BOTH_OF(done)(row["image"])) for row in made[2].test])
        texts = [[257, *f"a photo of a {name}.".encode(), 258] for name in ALL]
        scores = done.model(pixel_values=images, input_ids=torch.tensor(texts)).logits_per_image
    expected = [ALL[number] for number in scores.argmax(-1).tolist()]
    assert done.predict(made[2].test) == expected
    own = [row["label"] for row in made[2].test]
    assert done.evaluate(made)[2] == sum(a == b for a, b in zip(expected, own, strict=True)) / len(own)
    assert max(zero.values()) > 0  # type: ignore[type-var]
    assert done.system(next(iter(done.batches(made[1].train))), True).logits.shape[1] == 2  # training knows two
    chosen = done.predict(made[0].test, classes=["class0", "class5"])
    assert set(chosen) <= {"class0", "class5"}


def BOTH_OF(done: Learner) -> Any:
    return done.processor.image_processor


def test_without_it_classes_not_learnt_score_zero():
    done, made = learner(), cases.experiences("clip")
    assert set(done.evaluate(made).values()) == {0.0}
    done.learn(made[0])
    assert done.evaluate(made)[1] == 0.0


def test_a_zero_shot_model_needs_no_learning():
    done = learner("frozen", classes=ALL, protocol={"label_space": "declared"})
    made = cases.experiences("clip")
    before = done.evaluate(made)
    for experience in made:
        done.learn(experience)
    assert done.counters.steps == 0
    assert done.evaluate(made) == before and any(before.values())


# ---- class names
def test_the_text_of_a_class():
    made = objective(templates={"aircraft": "a photo of a {}, a type of aircraft.", "dtd": "{} texture."})
    assert made.class_text("aircraft:707-320") == "a photo of a 707-320, a type of aircraft."
    assert made.class_text("dtd:polka_dotted") == "polka dotted texture."
    assert made.class_text("other:sea_lake") == "a photo of a other:sea lake."
    assert made.class_text("dtd") == "a photo of a dtd."


def test_class_texts_end_with_the_end_token():
    made = objective(max_length=8, template="{}")
    assert made.class_tokens(["ab", "abcdefghij"], BOTH) == [[257, 97, 98, 258], [257, *b"abcdef", 258]]


def test_classes_of_one_text_are_refused():
    with pytest.raises(BadInput, match=r"label: 'sea_lake' and 'sea lake' are one text, 'a photo of a sea lake\.'"):
        objective().class_tokens(["sea_lake", "forest", "sea lake"], BOTH)
    with pytest.raises(BadInput, match="are one text"):
        objective(max_length=4).class_tokens(["one", "two"], BOTH)


@pytest.mark.parametrize("settings", [{"template": "no place"}, {"templates": {"a": "{} and {}"}}])
def test_a_template_has_one_place(settings):
    with pytest.raises(BadInput, match=r"template.*needs \{\} once"):
        objective(**settings)


# ---- captions
def captioned(number: int, colours: list[str], seed: int = 0) -> list[dict[str, Any]]:
    draw, made = np.random.default_rng(seed), []
    for index in range(number):
        colour = index % len(colours)
        image = draw.integers(0, 40, (8, 8, 3))
        image[..., colour] += 160
        made.append({"image": image.astype(np.uint8), "text": colours[colour] * 3})
    return made


def test_captions_are_learnt_and_scored_by_retrieval_over_the_split():
    done = learner(epochs=12, learning_rate=2e-2, per_device_eval_batch_size=2, per_device_train_batch_size=3)
    experience = Experience(0, "pairs", train=captioned(12, ["r", "g", "b"]), test=captioned(6, ["r", "g", "b"], 1))
    before = done.evaluate([experience])[0]
    done.learn(experience)
    assert done.seen == [] and before is not None
    score = done.evaluate([experience])[0]
    assert score is not None and score > max(before, 0.6)  # chance is one third
    batches = list(done.batches(experience.test))
    assert [len(batch) for batch in batches] == [2, 2, 2]
    done.learn(cases.experiences("clip")[0])  # classes may follow captions
    assert done.seen == ["class0", "class1"] and done.evaluate([experience])[0] is not None


def test_retrieval_counts_a_row_with_the_same_caption():
    rows = [{"text": "a"}, {"text": "b"}, {"text": "a"}]
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    images = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.0]])
    output = Output(features=images, other_features=texts, host={"scale": torch.tensor(2.0)})
    hits, count = objective().score(Batch({}, torch.zeros(3, dtype=torch.int64), rows), output)
    assert (float(hits), int(count)) == (2.0, 3)


def test_rows_of_both_kinds_are_refused():
    rows = [*captioned(2, ["r"]), *cases.experiences("clip")[0].test]
    with pytest.raises(BadInput, match="6 of 8 have a label"):
        learner().learn(Experience(0, "mixed", train=rows))
    done = learner()
    with pytest.raises(BadInput, match=r"row 0: has no field 'label'"):
        done.learn(Experience(0, "no label", train=[{"image": np.zeros((8, 8, 3), np.uint8)}]))
    with pytest.raises(BadInput, match=r"row 0.*'image'"):
        done.learn(Experience(0, "no image", train=[{"text": "b", "label": "a"}]))


# ---- what does not go together
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "linear_probe"}, "head class_text has nothing that trains"),
        ({"head": "cosine"}, "head: cosine does not fit objective 'image_text'; use head class_text"),
        ({"head": "class_text", "objective": "classification"}, "class_text does not fit objective 'classification'"),
        ({"protocol": {"mask": "all"}, "classes": ALL}, r"protocol\.mask: is all"),
        ({"protocol": {"label_space": "declared"}}, "label_space: declared needs the classes in advance"),
        ({"objective": {"image_text": {"max_length": 65}}}, "max_length: 65 is more than the text tower's 64"),
    ],
)
def test_refusals_name_the_field(settings, words):
    model, _ = cases.build_host("clip")
    with pytest.raises(BadInput, match=words):
        Learner(model, BOTH, **{"method": "moram", "objective": {"image_text": {"max_length": 32}}, **settings})


def test_a_recipe_says_it_before_a_model_is_loaded():
    from perdure.recipe import make_recipe

    base = {
        "model": {"scratch": {"family": "clip"}}, "stream": {"source": "stdlib", "experiences": 2},
        "objective": "image_text", "method": "moram",
    }  # fmt: skip
    recipe = make_recipe(base)
    assert list(recipe.head) == ["class_text"] and recipe.label == "moram"
    assert make_recipe({**base, "method": "er", "protocol": {"rehearsal": 200}}).label == "er"
    for change, words in [
        ({"head": "ridge"}, "head: ridge does not fit objective 'image_text'"),
        ({"method": "linear_probe"}, "head class_text has nothing that trains"),
        (
            {"objective": "classification", "protocol": {"label_space": "declared"}},
            r"protocol\.label_space: is declared",
        ),
    ]:
        with pytest.raises(BadInput, match=words):
            make_recipe({**base, **change})


def test_other_models_and_heads_are_refused():
    model, _ = cases.build_host("vit")
    with pytest.raises(BadInput, match="needs a CLIP model with two towers, but ViTModel has no vision_model"):
        Learner(model, BOTH, objective="image_text")
    model, processor = cases.build_host("bert")
    with pytest.raises(BadInput, match=r"protocol\.label_space: is declared, but only a head"):
        Learner(model, processor, classes=ALL, protocol={"label_space": "declared"})
    with pytest.raises(BadInput, match="rows of text need a tokenizer"):
        Learner(cases.build_host("clip")[0], BOTH.image_processor, objective="image_text")


# ---- image features of one tower under the other heads
@pytest.mark.parametrize("head", ["cosine", {"ridge": {"features": 32}}])
@pytest.mark.parametrize("method", ["finetune", {"lora": {"rank": 2}}])
def test_the_vision_tower_learns_alone_under_another_head(method, head):
    model, processor = cases.build_host("clip")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    done = Learner(
        model, processor, method=method, head=head, objective={"classification": {"tower": "vision"}},
        training={"learning_rate": 1e-2, "per_device_train_batch_size": 4, "epochs": 8},
    )  # fmt: skip
    made = cases.experiences("clip", 2, rows=16)
    done.learn(made[0])
    assert done.evaluate(made[:1])[0] > 0.7
    assert all("text_model" not in name for name, _ in done.named_trainable())
    after = dict(model.named_parameters())
    if method == "finetune":
        assert not torch.equal(after["vision_model.encoder.layers.0.mlp.fc1.weight"], before[
            "vision_model.encoder.layers.0.mlp.fc1.weight"])  # fmt: skip
        other = [name for name in before if not name.startswith("vision_model.")]
        assert all(torch.equal(after[name], before[name]) for name in other)


# ---- the old model
def test_the_model_of_the_last_boundary_keeps_its_own_class_texts():
    @register("remembers_for_a_test")
    class Remembers(Method):
        needs = frozenset({"old_model"})

        def losses(self, batch, output):
            if self.loop.has_previous_model:
                seen.append(self.loop.previous_model(batch).logits)
            return {}

    seen: list[torch.Tensor] = []
    try:
        done, made = learner([MORAM, "remembers_for_a_test"]), cases.experiences("clip", 2, rows=4)
        done.learn(made[0])
        with torch.no_grad():
            expected = {row["label"]: done.forward(batch).logits for row in made[1].train[:1]
                        for batch in done.batches(made[1].train, unlabelled=True)}  # fmt: skip
        done.learn(made[1])
    finally:
        METHODS._classes.pop("remembers_for_a_test")
    assert seen and seen[0].shape == (4, 2)
    (wanted,) = expected.values()
    assert torch.allclose(seen[0].sort(0).values, wanted.sort(0).values, atol=1e-5)
