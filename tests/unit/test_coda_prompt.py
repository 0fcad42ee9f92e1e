"""CODA-Prompt: the weighted sum and its gradients by loops, orthogonal starts, frozen components."""

from __future__ import annotations

import pytest
import torch
from hosts_tiny import build, result
from prompt_methods import clones, learner, strong, texts

from perdure.attachment import attach
from perdure.errors import BadInput, ProtocolRefused
from perdure.layers import ComponentPrefix, PromptQuery
from perdure.layers.prompts import orthogonal_rows

SMALL = {"components": 2, "length": 4}


def layer(experiences: int = 2) -> tuple[ComponentPrefix, PromptQuery]:
    query, generator = PromptQuery(6), torch.Generator().manual_seed(3)
    made = ComponentPrefix(6, 2, 5, query.choice).double()
    for _ in range(experiences):
        made.freeze()
        made.add(2, generator)
    return made, query


def test_the_prefix_and_its_gradients_against_loops():
    made, query = layer()
    q = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query.take(q, None)
    prefix = made(3, 7)
    leaves = {name: made.whole(name).detach().requires_grad_() for name in ("K", "A", "P")}
    keys, values = [], []
    for row in q:
        total = torch.zeros(2, 2, 5, dtype=torch.float64)
        for m in range(4):
            seen = row * leaves["A"][m]
            total = total + seen @ leaves["K"][m] / (seen.norm() * leaves["K"][m].norm()) * leaves["P"][m]
        keys.append(total[0])
        values.append(total[1])
    keys, values = torch.stack(keys), torch.stack(values)
    torch.testing.assert_close(prefix.keys, keys, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(prefix.values, values, atol=1e-12, rtol=1e-10)
    weight = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ((keys * weight).sum() + (values * weight.flip(0)).sum()).backward()
    ((prefix.keys * weight).sum() + (prefix.values * weight.flip(0)).sum()).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(getattr(made, f"new_{name}").grad, leaf.grad[2:], atol=1e-12, rtol=1e-10)
        assert leaf.grad[2:].abs().max() > 1e-3 and getattr(made, f"old_{name}").grad is None


def test_the_penalty_by_hand_and_gone_at_an_orthogonal_start():
    made, _ = layer()
    assert float(made.overlap().detach()) < 1e-12
    with torch.no_grad():
        made.new_K[0] += 0.5 * made.old_K[1]
        made.new_P[1] *= 2
    # K: entries (2, 1), (1, 2) become .5 and (2, 2) becomes 1.25; P: entry (3, 3) becomes 4
    assert float(made.overlap().detach()) == pytest.approx(2 * 0.25 + 0.25**2 + 3.0**2, abs=1e-6)


def test_new_rows_are_orthogonal_to_trained_ones_where_there_is_room():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(3, 6, generator=generator)  # as after training: neither orthogonal nor of unit length
    new = orthogonal_rows(old, 5, generator)
    assert new.shape == (5, 6)
    torch.testing.assert_close(new.norm(dim=1), torch.ones(5))
    assert (new[:3] @ old.t()).abs().max() < 1e-5
    torch.testing.assert_close(new[:3] @ new[:3].t(), torch.eye(3), atol=1e-5, rtol=0)
    assert not torch.equal(new[3], new[4])  # no room is left: random


def test_old_components_stay_byte_for_byte():
    made = learner(
        build("BertModel", vocab_size=300), {"coda_prompt": {**SMALL, "orthogonality": 0.1}}, epochs=2,
        weight_decay=0.1,
    ).learn(texts(0))  # fmt: skip
    first, base = clones(made.methods[0].state_dict()[0]), clones(made.frozen_base())
    made.learn(texts(1))
    second = made.methods[0].state_dict()[0]
    started = learner(build("BertModel", vocab_size=300), {"coda_prompt": SMALL}).methods[0]
    for number in (0, 1):
        for part in "KAP":
            name = f"modules/{number}.components/old_{part}"
            assert len(first[name]) == 2 and len(second[name]) == 4
            assert torch.equal(second[name][:2], first[name])
            lengths = second[name][2:].flatten(1).norm(dim=1)
            assert (lengths - 1).abs().max() > 1e-3  # they have moved from their start of unit length
    assert all(torch.equal(base[name], tensor) for name, tensor in made.frozen_base().items())
    assert started.modules["0.components"].size == 0
    assert made.counters.extra_rows == 48 and made.counters.extra_passes == 2


def test_rows_get_prompts_of_their_own_and_they_matter():
    made = strong(learner(build("BertModel", vocab_size=300), {"coda_prompt": SMALL}).learn(texts(0)), 30.0)
    batch = next(made.batches(texts(0).train, unlabelled=True))
    changed = result(made.model, **batch.inputs)
    plain = result(build("BertModel", vocab_size=300), **batch.inputs)
    assert (changed - plain).abs().max() > 1e-2
    one = {key: value[3:4] for key, value in batch.inputs.items()}
    real = one["attention_mask"][0].bool()
    torch.testing.assert_close(result(made.model, **one)[0][real], changed[3][real], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(BadInput, match="length.*is 5, which cannot be halved"):
        learner(build("BertModel", vocab_size=300), {"coda_prompt": {"length": 5}})
    with pytest.raises(ProtocolRefused, match="boundaries"):
        learner(build("BertModel", vocab_size=300), "coda_prompt", protocol={"boundaries": "none"})
    with pytest.raises(BadInput, match="layers: 7 is out of range"):
        attach(build("BertModel"), {"coda_prompt": {"layers": [7]}})
