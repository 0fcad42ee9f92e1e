"""The replay buffer: uniform, within budget, repeatable, and exact in its bytes."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from perdure.errors import BadInput, DamagedState
from perdure.replay import ReplayBuffer, row_bytes


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(n, label="a"):
    return [{"text": f"row {i}", "label": label} for i in range(n)]


def chi_square(counts, expected):
    return sum((c - expected) ** 2 / expected for c in counts)


def test_every_row_is_kept_equally_often():
    """300 runs, 8 of 40 rows each: a count has variance 300·.2·.8, so the sum over 40 is about 32."""
    kept = Counter()
    for seed in range(300):
        buffer = ReplayBuffer(8, generator=gen(seed))
        stream = rows(40)
        for start in range(0, 40, 7):
            buffer.add(stream[start : start + 7], index=range(start, min(start + 7, 40)))
        assert len(buffer) == 8 and buffer.seen == 40
        kept.update(row["text"] for row in buffer.rows)
    assert 15 < chi_square([kept[f"row {i}"] for i in range(40)], 60) < 55  # 0.1 % bounds of χ²(39), times 0.8


def test_byte_budget_keeps_early_and_late_rows_equally_often():
    size = row_bytes({"text": "row 10", "label": "a"})
    kept = Counter()
    for seed in range(300):
        buffer = ReplayBuffer(100, bytes=8 * size, generator=gen(seed))
        buffer.add([{"text": f"row {i}", "label": "a"} for i in range(10, 50)])
        assert len(buffer) == 8 and buffer.nbytes == 8 * size
        kept.update(row["text"] for row in buffer.rows)
    assert 15 < chi_square([kept[f"row {i}"] for i in range(10, 50)], 60) < 55


@pytest.mark.parametrize("balanced", [False, True])
def test_budgets_are_never_exceeded(balanced):
    random = np.random.default_rng(0)
    buffer = ReplayBuffer(20, bytes=1500, balanced=balanced, generator=gen())
    for step in range(200):
        text = "x" * int(random.integers(1, 200))
        buffer.add([{"text": text, "label": str(step % 3)}], labels=[str(step % 3)])
        assert len(buffer) <= 20 and buffer.nbytes <= 1500
        assert buffer.nbytes == sum(row_bytes(row) for row in buffer.rows)
    assert len(buffer) > 3
    huge = {"text": "y" * 2000, "label": "0"}
    before = buffer.rows
    buffer.add([huge])
    assert buffer.refused == 1 and buffer.rows == before


def test_balanced_buffer_gives_rare_classes_their_share():
    stream = rows(300, "often") + rows(12, "rare") + rows(100, "middle")
    plain, balanced = ReplayBuffer(30, generator=gen()), ReplayBuffer(30, balanced=True, generator=gen())
    for buffer in (plain, balanced):
        buffer.add(stream)
    counts = Counter(row["label"] for row in balanced.rows)
    assert counts == {"often": 10, "rare": 10, "middle": 10}
    assert Counter(row["label"] for row in plain.rows)["rare"] < 6
    with pytest.raises(BadInput, match="'label' is missing"):
        balanced.add([{"text": "no label"}])


def test_balanced_buffer_is_uniform_within_a_class():
    kept = Counter()
    for seed in range(300):
        buffer = ReplayBuffer(8, balanced=True, generator=gen(seed))
        buffer.add([{"text": str(i), "label": "a"} for i in range(40)])
        kept.update(row["text"] for row in buffer.rows)
    assert 15 < chi_square([kept[str(i)] for i in range(40)], 60) < 55


def test_rows_from_the_buffer_are_not_offered_again():
    buffer = ReplayBuffer(10, generator=gen())
    buffer.add(rows(4), index=torch.tensor([0, -1, 2, -1]))
    assert buffer.seen == 2 and [r["text"] for r in buffer.rows] == ["row 0", "row 2"]


def test_sampling_depends_on_the_generator_alone():
    buffer = ReplayBuffer(50, generator=gen())
    buffer.add(rows(50))
    generator = gen(5)
    state = generator.get_state()
    first = buffer.sample(10, generator)
    second = buffer.sample(10, generator)
    generator.set_state(state)
    assert buffer.sample(10, generator) == first != second
    assert len({row["text"] for row in first}) == 10
    assert len(buffer.sample(99, generator)) == 50
    assert ReplayBuffer(5, generator=gen()).sample(3) == []


def test_stored_rows_are_copies():
    image = np.zeros((2, 2, 3), np.uint8)
    row = {"image": image, "label": "a"}
    buffer = ReplayBuffer(2, generator=gen())
    buffer.add([row])
    image[:] = 9
    row["label"] = "b"
    assert buffer.rows[0]["label"] == "a" and not buffer.rows[0]["image"].any()


@pytest.mark.parametrize("balanced", [False, True])
def test_state_goes_round_and_the_run_goes_on_alike(balanced):
    def mixed(start, n):
        random = np.random.default_rng(start)
        return [
            {
                "text": f"größer {i}",
                "label": str(i % 3),
                "image": random.integers(0, 256, (2, 2 + i % 3, 3)).astype(np.uint8),
            }
            for i in range(start, start + n)
        ]

    generator = gen()
    buffer = ReplayBuffer(12, bytes=700, balanced=balanced, generator=generator)
    buffer.add(mixed(0, 30))
    tensors, values = buffer.state_dict()
    values = json.loads(json.dumps(values))
    tensors = {k: t.clone() for k, t in tensors.items()}
    later = gen()
    later.set_state(generator.get_state())
    assert tensors["arrays"].dtype == torch.uint8
    other = ReplayBuffer(12, bytes=700, balanced=balanced, generator=later)
    other.load_state_dict(tensors, values)
    for b in (buffer, other):
        b.add(mixed(30, 40))
    assert buffer.nbytes == other.nbytes <= 700
    a, b = buffer.state_dict(), other.state_dict()
    assert a[1] == b[1] and torch.equal(a[0]["arrays"], b[0]["arrays"])
    for x, y in zip(buffer.sample(5), other.sample(5), strict=True):
        assert x["text"] == y["text"] and np.array_equal(x["image"], y["image"])


def test_bytes_are_those_of_the_stored_state():
    buffer = ReplayBuffer(5, generator=gen())
    buffer.add([{"text": "é" * 10, "label": "a", "image": np.zeros((4, 4, 3), np.uint8)}])
    tensors, _ = buffer.state_dict()
    assert buffer.nbytes == tensors["arrays"].numel() + len('{"text":"","label":"a"}') + 20


def test_wrong_rows_and_states_are_refused():
    buffer = ReplayBuffer(3, generator=gen())
    with pytest.raises(BadInput, match="row 0: field 'image' is of type array of float32"):
        buffer.add([{"image": np.zeros((2, 2, 3), np.float32)}])
    with pytest.raises(BadInput, match="samples"):
        ReplayBuffer(-1)
    with pytest.raises(ValueError, match="generator"):
        ReplayBuffer(1).add(rows(2))
    buffer.add([{"image": np.zeros((2, 2, 3), np.uint8)}] * 3)
    tensors, values = buffer.state_dict()
    with pytest.raises(BadInput, match="3 rows"):
        ReplayBuffer(2, generator=gen()).load_state_dict(tensors, values)
    with pytest.raises(BadInput, match="bytes"):
        ReplayBuffer(3, bytes=10, generator=gen()).load_state_dict(tensors, values)
    with pytest.raises(DamagedState):
        ReplayBuffer(3, generator=gen()).load_state_dict({"arrays": tensors["arrays"][:-1]}, values)
