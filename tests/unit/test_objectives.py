"""Objectives: rows to batch to loss to score, on tiny hosts with random weights."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from perdure.data import Batch, Output
from perdure.errors import BadInput
from perdure.objectives._augment import flip_crop, resized_crop
from perdure.objectives.causal_lm import CausalLM
from perdure.objectives.classification import Classification, pool
from perdure.processors import ByteTokenizer, ImageProcessor
from perdure.registry import HEADS, OBJECTIVES

TOKENIZER = ByteTokenizer()
TEXT_ROWS = [
    {"text": "a b c", "label": "x"},
    {"text": "longer than the first", "label": "y"},
    {"text": "d", "label": "x"},
]
LABELS = {"x": 0, "y": 1}


def objective(name, **settings):
    ((_, config),) = OBJECTIVES.parse({name: settings}, "objective")
    return OBJECTIVES.get(name)(config)


def head(width, classes=2):
    ((_, config),) = HEADS.parse("linear", "head")
    made = HEADS.get("linear")(config)
    made.build(width, 0)
    made.grow(classes)
    return made


@pytest.fixture(scope="module")
def bert():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForMaskedLM(BertConfig(vocab_size=259, max_position_embeddings=48, **sizes)).eval()


@pytest.fixture(scope="module")
def vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).eval()


@pytest.fixture(scope="module")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = GPT2Config(vocab_size=259, bos_token_id=257, eos_token_id=258, initializer_range=0.5, **sizes)
    return GPT2LMHeadModel(config).eval()


def batch_of(obj, rows, processor=TOKENIZER, labels=None, **options):
    return obj.collate(obj.encode(rows, processor, **options), rows, labels, range(len(rows)))


# ---- classification of text
def test_text_batch_is_padded_and_labelled():
    batch = batch_of(objective("classification", max_length=10), TEXT_ROWS, labels=LABELS)
    assert batch.inputs["input_ids"].shape == (3, 10)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [6, 10, 2]
    assert batch.inputs["input_ids"][2].tolist() == [257, 100] + [256] * 8
    assert batch.labels.tolist() == [0, 1, 0] and batch.index.tolist() == [0, 1, 2] and len(batch) == 3
    assert batch_of(objective("classification"), TEXT_ROWS).labels is None


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_features_do_not_depend_on_padding(bert, pooling):
    obj = objective("classification", pooling=pooling, max_length=32)
    with torch.no_grad():
        together = obj.forward(bert, head(16), batch_of(obj, TEXT_ROWS))
        alone = [obj.forward(bert, head(16), batch_of(obj, [row])) for row in TEXT_ROWS]
    assert torch.allclose(together.features, torch.cat([o.features for o in alone]), atol=1e-5)
    assert torch.allclose(together.logits, torch.cat([o.logits for o in alone]), atol=1e-5)
    assert together.features.std() > 1e-3


def test_pooling_by_hand():
    states = torch.arange(24.0).reshape(2, 4, 3)
    right, left = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(pool(states, right, "mean")[0], states[0, :2].mean(0))
    assert torch.equal(pool(states, right, "last"), torch.stack([states[0, 1], states[1, 3]]))
    assert torch.equal(pool(states, left, "cls"), torch.stack([states[0, 2], states[1, 0]]))
    assert torch.equal(pool(states, left, "last"), torch.stack([states[0, 3], states[1, 3]]))
    assert torch.equal(pool(states, None, "cls"), states[:, 0])
    maps = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert torch.equal(pool(maps, None, "cls"), maps.mean((2, 3)))
    with pytest.raises(BadInput, match="max"):
        pool(states, None, "max")


def test_auto_pooling_by_family(bert, gpt2, vit):
    text = objective("classification", max_length=32)
    images = [{"image": np.zeros((16, 16, 3), np.uint8), "label": "x"}]
    pixels = batch_of(text, images, ImageProcessor((16, 16)))
    ids = batch_of(text, TEXT_ROWS)
    for model, batch, expected in ((bert, ids, "mean"), (gpt2, ids, "last"), (vit, pixels, "cls")):
        with torch.no_grad():
            auto, _ = text.features(model, batch)
            named, host = text.features(model, batch, expected)
        assert torch.equal(auto, named)
        assert auto.shape == (len(batch), 16) and not hasattr(host, "logits")


def test_cached_features_replace_the_host_and_unit_norm(bert):
    obj = objective("classification", normalize=True, max_length=32)
    batch = batch_of(obj, TEXT_ROWS, labels=LABELS)
    with torch.no_grad():
        features, _ = obj.features(bert, batch)
        direct = obj.forward(bert, head(16), batch)
        cached = obj.forward(None, head(16), Batch({}, batch.labels, features=features))
    assert torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-6)
    assert torch.equal(direct.logits, cached.logits)


def test_loss_is_the_sum_over_allowed_classes():
    obj = objective("classification")
    logits = torch.randn(4, 5, requires_grad=True)
    labels = torch.tensor([0, 2, 2, 4])
    total, count = obj.loss(Batch({}, labels), Output(logits=logits))
    assert torch.allclose(total, cross_entropy(logits, labels, reduction="sum")) and int(count) == 4
    allowed = torch.tensor([True, False, True, False, True])
    total, _ = obj.loss(Batch({}, labels), Output(logits=logits), allowed)
    narrow = cross_entropy(logits[:, allowed], torch.tensor([0, 1, 1, 2]), reduction="sum")
    assert torch.allclose(total, narrow)
    total.backward()
    assert logits.grad.isfinite().all() and not logits.grad[:, [1, 3]].any() and logits.grad[:, [0, 2, 4]].all()


def test_rows_of_minus_100_count_nothing_whatever_the_mask():
    obj = objective("classification")
    logits = torch.randn(3, 4, requires_grad=True)
    labels = torch.tensor([1, -100, 3])
    allowed = torch.tensor([[True, True, False, False], [False] * 4, [False, False, True, True]])
    total, count = obj.loss(Batch({}, labels), Output(logits=logits), allowed)
    by_hand = -log_softmax(logits[0, :2], 0)[1] - log_softmax(logits[2, 2:], 0)[1]
    assert torch.allclose(total, by_hand) and int(count) == 2
    total.backward()
    assert logits.grad.isfinite().all() and not logits.grad[1].any()


def test_own_label_outside_the_mask_is_an_internal_error():
    obj = objective("classification")
    output = Output(logits=torch.zeros(2, 3))
    batch = Batch({}, torch.tensor([0, 2]))
    with pytest.raises(RuntimeError, match="internal error: row 1 .* class id 2"):
        obj.loss(batch, output, torch.tensor([True, True, False]))
    with pytest.raises(RuntimeError, match="internal error: row 0"):
        obj.loss(batch, output, torch.tensor([[False, True, True], [True, True, True]]))
    with pytest.raises(RuntimeError, match="internal error: row 1 .* class id 3"):
        obj.loss(Batch({}, torch.tensor([0, 3])), output)


def test_accuracy_over_allowed_classes():
    obj = objective("classification")
    logits = torch.tensor([[3.0, 2, 1], [3, 2, 1], [1, 2, 3], [1, 2, 3]])
    batch = Batch({}, torch.tensor([0, 1, 2, -100]))
    correct, rows = obj.score(batch, Output(logits=logits))
    assert correct.dtype == torch.float64 and (correct.item(), int(rows)) == (2.0, 3)
    correct, _ = obj.score(batch, Output(logits=logits), torch.tensor([False, True, True]))
    assert correct.item() == 2.0
    assert obj.finish(2.0, 3) == 2 / 3 and math.isnan(obj.finish(0.0, 0))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "t"}, "row 1: field 'label' is missing"),
        ({"label": "x"}, "row 1: field 'text' is missing"),
        ({"text": 5, "label": "x"}, "row 1: field 'text' is of type int"),
        ({"text": "t", "label": 5}, "row 1: field 'label' is of type int"),
        ("t", "row 1: expected a mapping"),
        ({"image": np.zeros((2, 2)), "label": "x"}, "row 1: field 'image': image: expected uint8"),
    ],
)
def test_wrong_rows_are_named(row, message):
    with pytest.raises(BadInput, match=message):
        objective("classification").check([TEXT_ROWS[0], row], TOKENIZER)


def test_wrong_labels_processors_and_settings_are_named(bert):
    obj = objective("classification", max_length=32)
    with pytest.raises(BadInput, match=r"row 1: label 'y' is not among the 1 known classes \(x\)"):
        batch_of(obj, TEXT_ROWS, labels={"x": 0})
    with pytest.raises(BadInput, match="need a tokenizer"):
        obj.check(TEXT_ROWS, ImageProcessor((4, 4)))
    with pytest.raises(BadInput, match="need an image processor"):
        obj.check([{"image": np.zeros((4, 4, 3), np.uint8), "label": "x"}], TOKENIZER)
    with pytest.raises(BadInput, match="1 of 2 have an image"):
        obj.check([TEXT_ROWS[0], {"image": np.zeros((4, 4, 3), np.uint8), "label": "x"}], TOKENIZER)
    obj.check_model(bert, TOKENIZER)
    with pytest.raises(BadInput, match="max_length: 128 is more than the model's 48"):
        objective("classification").check_model(bert, TOKENIZER)
    with pytest.raises(BadInput, match="objective.classification.pooling"):
        objective("classification", pooling="max")


# ---- classification of images
@pytest.mark.parametrize("kind", ["flip_crop", "resized_crop"])
def test_augmentation_is_a_function_of_the_seed(kind):
    obj = objective("classification", augment=kind)
    rng = np.random.default_rng(0)
    rows = [{"image": rng.integers(0, 256, (16, 16, 3)).astype(np.uint8), "label": "x"}] * 2
    processor = ImageProcessor((16, 16))
    first, second, other = (
        np.stack([e["pixel_values"] for e in obj.encode(rows, processor, True, seeds)])
        for seeds in ([1, 2], [1, 2], [3, 2])
    )
    plain = obj.encode(rows, processor)
    assert (
        np.array_equal(first, second) and np.array_equal(first[1], other[1]) and not np.array_equal(first[0], other[0])
    )
    assert np.array_equal(plain[0]["pixel_values"], processor(rows[0]["image"]))
    with pytest.raises(ValueError, match="one seed"):
        obj.encode(rows, processor, True)


def test_parts_of_an_image_of_any_size():
    height, width = 40, 60
    image = np.stack(np.broadcast_arrays(np.arange(height)[:, None], np.arange(width)[None], 0), -1).astype(np.uint8)
    areas, ratios, mirrored = [], [], 0
    for seed in range(400):
        part = resized_crop(image, seed)
        h, w = part.shape[:2]
        rows, columns = part[:, 0, 0].astype(int), part[0, :, 1].astype(int)
        mirrored += columns[0] > columns[-1]
        steps = -1 if columns[0] > columns[-1] else 1
        assert (np.diff(rows) == 1).all() and (np.diff(columns) == steps).all()  # a connected part, nothing else
        areas.append(h * w / (height * width))
        ratios.append(w / h)
    assert 0.04 < min(areas) < 0.1 and max(areas) > 0.8  # whole pixels round the bounds
    assert min(ratios) > 0.7 and max(ratios) < 1.42 and 150 < mirrored < 250
    assert resized_crop(np.zeros((1, 90, 3), np.uint8), 0).shape == (1, 1, 3)  # no draw fits: cut from the centre


def test_flip_and_crop_by_hand():
    image = np.arange(16 * 16 * 3, dtype=np.uint32).reshape(16, 16, 3) % 251 + 1
    image = image.astype(np.uint8)
    flips, shifts = 0, set()
    for seed in range(200):
        out = flip_crop(image, seed)
        assert out.shape == image.shape and out.dtype == np.uint8
        found = [
            (flip, dy, dx)
            for flip, source in ((0, image), (1, image[:, ::-1]))
            for dy in range(5)
            for dx in range(5)
            if np.array_equal(out, np.pad(source, ((2, 2), (2, 2), (0, 0)))[dy : dy + 16, dx : dx + 16])
        ]
        assert len(found) == 1
        flips += found[0][0]
        shifts.add(found[0][1:])
    assert 70 < flips < 130 and len(shifts) == 25


# ---- causal language modelling
def answers():
    return [
        {"prompt": "2 + 2 =", "answer": " 4"},
        {"prompt": "a", "answer": " longer answer"},
        {"text": "only text"},
    ]


def test_labels_stand_on_the_answer_alone():
    batch = batch_of(objective("causal_lm"), answers())
    ids, labels = batch.inputs["input_ids"], batch.labels
    assert labels[0].tolist()[:12] == [-100] * 8 + [32, 52, 258] + [-100]
    assert ids[0].tolist()[:11] == [257, *b"2 + 2 = 4", 258]
    assert labels[1][2:].tolist() == [*b" longer answer", 258]
    assert labels[2][:10].tolist() == [257, *b"only text"] and (labels[2][10:] == -100).all()
    assert (ids[batch.inputs["attention_mask"] == 0] == 256).all()
    without = objective("causal_lm", append_eos=False).encode(answers()[:1], TOKENIZER)[0]
    assert without["labels"] == [-100] * 8 + [32, 52]


def test_long_rows_keep_what_is_learnt():
    obj = objective("causal_lm", block_size=6)
    prompt, text, answer = obj.encode(
        [{"prompt": "abcdefgh", "answer": "xy"}, {"text": "abcdefgh"}, {"prompt": "ab", "answer": "stuvwxyz"}],
        TOKENIZER,
    )
    # A prompt keeps its end and the token that opens every text.
    assert prompt["input_ids"] == [257, *b"ghxy", 258] and prompt["labels"] == [-100] * 3 + [*b"xy", 258]
    assert text["input_ids"] == text["labels"] == [257, *b"abcde"]
    assert answer["input_ids"] == [*b"bstuvw"] and answer["labels"] == [-100, *b"stuvw"]
    assert len(objective("causal_lm", block_size=None).encode([{"text": "a" * 999}], TOKENIZER)[0]["input_ids"]) == 1000


def test_loss_is_that_of_each_row_alone(gpt2):
    obj = objective("causal_lm", block_size=64)
    batch = batch_of(obj, answers())
    with torch.no_grad():
        output = obj.forward(gpt2, None, batch)
        total, count = obj.loss(batch, output)
        nll, tokens = obj.score(batch, output)
        expected, expected_count = 0.0, 0
        for row in answers():
            encoded = obj.encode([row], TOKENIZER)[0]
            ids, labels = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["labels"]])
            n = int((labels[:, 1:] != -100).sum())
            expected += float(gpt2(input_ids=ids, labels=labels).loss) * n
            expected_count += n
    assert int(count) == int(tokens) == expected_count == 3 + 15 + 9
    assert total.dtype == torch.float32 and nll.dtype == torch.float64
    assert math.isclose(float(total), expected, rel_tol=1e-5) and math.isclose(float(nll), expected, rel_tol=1e-5)
    assert math.isclose(obj.finish(float(nll), int(tokens)), math.exp(expected / expected_count), rel_tol=1e-5)
    assert (
        obj.finish(1e9, 1) == float("inf")
        and math.isnan(obj.finish(0.0, 0))
        and math.isnan(obj.finish(float("nan"), 1))
    )


def test_training_on_answers_makes_the_model_write_them(gpt2):
    """Loss, labels and generation fit together: what is learnt comes out, and stops at the end token."""
    obj = objective("causal_lm", block_size=64)
    rows = answers()[:2]
    model = copy.deepcopy(gpt2).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    batch = batch_of(obj, rows)
    torch.manual_seed(0)
    for _ in range(60):
        total, count = obj.loss(batch, obj.forward(model, None, batch))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    written = obj.generate(model, TOKENIZER, rows, max_new_tokens=20)
    assert written == [" 4", " longer answer"]
    assert model.training


def test_generation_in_a_batch_equals_generation_alone(gpt2):
    obj = objective("causal_lm")
    rows = [{"prompt": "a"}, {"text": "something longer"}, {"prompt": "mid", "answer": "ignored"}]
    together = obj.generate(gpt2, TOKENIZER, rows, max_new_tokens=12)
    assert together == [obj.generate(gpt2, TOKENIZER, [row], max_new_tokens=12)[0] for row in rows]
    assert together == obj.generate(gpt2, TOKENIZER, rows, max_new_tokens=12, batch_size=2)
    long = obj.generate(gpt2, TOKENIZER, [{"prompt": "x" * 200}], max_new_tokens=4)
    assert long == obj.generate(gpt2, TOKENIZER, [{"prompt": "x" * 199}], max_new_tokens=4)
    with pytest.raises(BadInput, match="max_new_tokens: 64 leaves no room"):
        obj.generate(gpt2, TOKENIZER, rows)


class ChatTokenizer(ByteTokenizer):
    """Writes `<role>content;` for each turn, and opens an answer with `<assistant>`."""

    chat_template = "by hand"
    rewrites = False

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        cut = 1 if self.rewrites and len(messages) > 2 else 0
        text = "".join(f"<{m['role']}>{m['content']};" for m in messages[cut:])
        return text + "<assistant>" * add_generation_prompt


def test_messages_learn_the_assistants_turns(gpt2):
    talk = [("user", "hi"), ("assistant", "yo"), ("user", "bye"), ("assistant", "ok")]
    row = {"messages": [{"role": role, "content": content} for role, content in talk]}
    obj, tokenizer = objective("causal_lm", block_size=64), ChatTokenizer()
    obj.check([row], tokenizer)
    encoded = obj.encode([row], tokenizer)[0]
    assert bytes(encoded["input_ids"]).decode() == "<user>hi;<assistant>yo;<user>bye;<assistant>ok;"
    assert bytes(i for i in encoded["labels"] if i != -100).decode() == "yo;ok;"
    assert len(obj.generate(gpt2, tokenizer, [row], max_new_tokens=3)) == 1
    with pytest.raises(BadInput, match="needs a chat template"):
        obj.check([row], TOKENIZER)
    with pytest.raises(BadInput, match="no turn of the role 'assistant'"):
        obj.check([{"messages": row["messages"][:1]}], tokenizer)
    tokenizer.rewrites = True
    with pytest.raises(BadInput, match="rewrites earlier turns"):
        obj.encode([row], tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "row 0: field 'answer' is missing"),
        ({"answer": "a"}, "row 0: field 'prompt' is missing"),
        ({"prompt": "p", "answer": ""}, "row 0: field 'answer' is empty"),
        ({"text": ""}, "row 0: field 'text' is empty"),
        ({"label": "x"}, "row 0: field 'text' is missing"),
    ],
)
def test_wrong_language_rows_are_named(row, message):
    with pytest.raises(BadInput, match=message):
        objective("causal_lm").check([row], TOKENIZER)


def test_models_that_do_not_fit_are_refused(gpt2):
    objective("causal_lm", block_size=64).check_model(gpt2, TOKENIZER)
    with pytest.raises(BadInput, match="block_size: 65 is more than the model's 64"):
        objective("causal_lm", block_size=65).check_model(gpt2, TOKENIZER)
    with pytest.raises(BadInput, match="no language-modelling head"):
        objective("causal_lm", block_size=64).check_model(gpt2.transformer, TOKENIZER)


def test_objectives_are_known_by_name():
    assert isinstance(objective("classification"), Classification) and isinstance(objective("causal_lm"), CausalLM)
    assert OBJECTIVES.names() == ["causal_lm", "classification", "image_text", "instruction"]
    assert not CausalLM.needs_head and not CausalLM.higher_is_better and CausalLM.metric == "perplexity"
