"""Retrieval as free-energy minimum: worked numbers, the statements that RwF rests on, and the layer's fast path."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from perdure.errors import BadInput
from perdure.layers import PARTS, RetrievedPrompts, StaticPrompts
from perdure.memory import free_energy, least_free_energy, retrieve
from perdure.memory.reference import retrieved_prompts

BETAS = [0.1, 1.0, 5.0]
quick = settings(max_examples=40, deadline=None)
double = {"dtype": torch.float64}


def draws(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, **double) for shape in shapes]


# ---- worked by hand
def test_two_patterns_by_hand():
    """Scores 1 and 0 at beta = ln 3: weights 3/4 and 1/4."""
    query, keys = torch.tensor([[1.0, 0.0]], **double), torch.tensor([[1.0, 5.0], [0.0, 7.0]], **double)
    values = torch.tensor([[4.0, 0.0, -4.0], [0.0, 8.0, 4.0]], **double)
    out, weights = retrieve(query, keys, values, math.log(3))
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]], **double))
    torch.testing.assert_close(out, torch.tensor([[3.0, 2.0, -2.0]], **double))
    scores = torch.tensor([1.0, 0.0], **double)
    # F(p*) = -3/4 + (3/4 ln 3/4 + 1/4 ln 1/4) / ln 3 = -ln(3 + 1) / ln 3
    least = least_free_energy(scores, math.log(3)).item()
    assert least == pytest.approx(-math.log(4) / math.log(3), abs=1e-14)
    assert free_energy(weights[0], scores, math.log(3)).item() == pytest.approx(least, abs=1e-14)
    # all on the first pattern: F = -1, and KL(p || p*) = ln 4/3
    corner = free_energy(torch.tensor([1.0, 0.0], **double), scores, math.log(3)).item()
    assert corner == -1.0 and corner - least == pytest.approx(math.log(4 / 3) / math.log(3), abs=1e-14)


def test_gradients_by_hand():
    """dL/dq = beta sum_i p_i (g.v_i - g.out) k_i, dL/dk_i = beta p_i (g.v_i - g.out) q, dL/dv_i = p_i g."""
    query, keys, values, grad = draws(0, (1, 3), (5, 3), (5, 4), (4,))
    tensors = [t.requires_grad_() for t in (query, keys, values)]
    out, weights = retrieve(*tensors, 1.7)
    out[0].backward(grad)
    p = weights[0].detach()
    pull = 1.7 * p * (values.detach() @ grad - out[0].detach() @ grad)
    torch.testing.assert_close(query.grad, (pull @ keys.detach())[None])
    torch.testing.assert_close(keys.grad, pull[:, None] * query.detach())
    torch.testing.assert_close(values.grad, p[:, None] * grad)


# ---- the functional
@quick
@given(seed=st.integers(0, 10**6), count=st.integers(1, 9), beta=st.sampled_from(BETAS), sharp=st.floats(0.1, 20))
def test_the_softmax_is_the_unique_minimiser_and_the_gap_is_a_kl(seed, count, beta, sharp):
    scores, raw = draws(seed, (count,), (count,))
    best = torch.softmax(beta * scores, 0)
    least = least_free_energy(scores, beta)
    torch.testing.assert_close(free_energy(best, scores, beta), least, atol=1e-12, rtol=0)
    p = torch.softmax(sharp * raw, 0)
    gap = free_energy(p, scores, beta) - least
    kl = F.kl_div(best.log(), p, reduction="sum")
    torch.testing.assert_close(gap, kl / beta, atol=1e-11, rtol=1e-10)
    distance = (p - best).abs().sum()
    assert gap >= distance.square() / (2 * beta) - 1e-11
    if distance > 1e-3:
        assert gap > 0
    corner = F.one_hot(torch.tensor(seed % count), count).double()  # 0 log 0
    torch.testing.assert_close(
        free_energy(corner, scores, beta) - least, -best[seed % count].log() / beta, atol=1e-11, rtol=1e-10
    )


@pytest.mark.parametrize("beta", BETAS)
def test_strong_convexity(beta):
    (scores, raw) = draws(4, (6,), (6,))
    p = torch.softmax(raw, 0)
    hessian = torch.autograd.functional.hessian(lambda x: free_energy(x, scores, beta), p)
    torch.testing.assert_close(hessian, torch.diag(1 / p) / beta)
    assert torch.linalg.eigvalsh(hessian).min() >= 1 / beta


@pytest.mark.parametrize("beta", BETAS)
def test_lipschitz_bound_and_that_it_is_tight(beta):
    values = torch.eye(6, **double)
    worst = 0.0
    for seed in range(30):
        (scores,) = draws(seed, (6,))
        jacobian = torch.autograd.functional.jacobian(
            lambda s: retrieve(torch.ones(1, 1, **double), s[:, None], values, beta)[0][0], 4 * scores
        )
        worst = max(worst, torch.linalg.matrix_norm(jacobian, 2).item())
    assert 0 < worst <= beta / 2 + 1e-12
    two = torch.tensor([0.3, 0.3], **double)  # p = (1/2, 1/2)
    jacobian = torch.autograd.functional.jacobian(
        lambda s: retrieve(torch.ones(1, 1, **double), s[:, None], values[:2, :2], beta)[0][0], two
    )
    assert torch.linalg.matrix_norm(jacobian, 2).item() == pytest.approx(beta / 2, abs=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_iterating_never_raises_the_energy(beta):
    """Ramsauer et al.: E(x) = -lse(beta, K x) + |x|^2 / 2, x <- softmax(beta K x) K."""
    patterns, state = draws(7, (8, 4), (1, 4))

    def energy(x):
        return (least_free_energy((patterns @ x.T)[:, 0], beta) + x.square().sum() / 2).item()

    seen = [energy(state)]
    for _ in range(6):
        state, _ = retrieve(state, patterns, patterns, beta)
        seen.append(energy(state))
    assert seen[1] < seen[0] and all(b <= a + 1e-12 for a, b in zip(seen, seen[1:], strict=False))


# ---- what is retrieved
@quick
@given(seed=st.integers(0, 10**6), count=st.integers(1, 9), beta=st.sampled_from([0.0, *BETAS]))
def test_convex_hull(seed, count, beta):
    queries, keys, values, directions = draws(seed, (3, 4), (count, 4), (count, 5), (5, 50))
    out, weights = retrieve(queries, keys, values, beta)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, **double), atol=1e-14, rtol=0)
    # in the hull: in no direction beyond the farthest value
    assert bool(((out @ directions) <= (values @ directions).amax(0) + 1e-12).all())


def test_limits_of_beta():
    queries, keys, values = draws(2, (3, 4), (7, 4), (7, 5))
    mean, weights = retrieve(queries, keys, values, 0.0)
    assert torch.equal(weights, torch.full((3, 7), 1 / 7, **double))
    torch.testing.assert_close(mean, values.mean(0).expand(3, -1))
    torch.testing.assert_close(retrieve(queries, keys, values, 1e-9)[0], mean, atol=1e-7, rtol=0)
    nearest = (queries @ keys.T).argmax(-1)
    torch.testing.assert_close(retrieve(queries, keys, values, 1e6)[0], values[nearest])


def test_one_pattern_leaves_queries_and_keys_without_gradient():
    queries, keys, values = (t.requires_grad_() for t in draws(3, (3, 4), (1, 4), (1, 5)))
    retrieve(queries, keys, values, 2.0)[0].square().sum().backward()
    assert not queries.grad.any() and not keys.grad.any() and bool(values.grad.any())


def test_hidden_patterns_and_none_at_all():
    queries, keys, values = draws(5, (3, 4), (2, 7, 4), (2, 7, 5))
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0] * 7]).bool()
    keys, values = keys.requires_grad_(), values.requires_grad_()
    out, weights = retrieve(queries, keys, values, 1.3, mask)
    alone, _ = retrieve(queries, keys[0][mask[0]], values[0][mask[0]], 1.3)
    torch.testing.assert_close(out[0], alone, atol=1e-14, rtol=0)
    assert not weights[0][:, ~mask[0]].any() and not out[1].any()
    out.square().sum().backward()
    for tensor in (keys, values):
        assert bool(torch.isfinite(tensor.grad).all()) and not tensor.grad[~mask].any() and bool(tensor.grad[0].any())


# ---- the layer
def layer_of(width=12, length=4, heads=1, beta=None, train=PARTS, seed=1) -> RetrievedPrompts:
    """With larger weights than a new layer's, so that routing is far from uniform."""
    layer = RetrievedPrompts(width, length, heads=heads, beta=beta, train=train).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    return layer


def plainly(layer: RetrievedPrompts, tokens, mask=None):
    value = None if layer.W_V is None else (layer.W_V, layer.b_V)
    return retrieved_prompts(
        tokens, layer.P, (layer.W_Q, layer.b_Q), layer.W_K, value, (layer.W_O, layer.b_O),
        heads=layer.heads, beta=layer.beta, mask=mask,
    )  # fmt: skip


MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]).bool()


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("train", [PARTS, ("P", "W_Q", "W_K", "W_O")])
@pytest.mark.parametrize(("heads", "beta"), [(1, None), (3, None), (4, 2.0), (1, 0.0)])
def test_the_layer_equals_the_reference(heads, beta, train, mask):
    layer = layer_of(heads=heads, beta=beta, train=train)
    (tokens,) = draws(8, (3, 6, 12))
    found = []
    for run in (layer, lambda x, m: plainly(layer, x, m)):
        layer.zero_grad()
        x = (3 * tokens + 0.5).requires_grad_()
        out = run(x, mask)
        (out * draws(9, tuple(out.shape))[0]).sum().backward()
        grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
        found.append((out.detach(), x.grad, grads))
    assert set(found[0][2]) == {name for name, _ in layer.trained()}
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-10)
    moved = {name for name, grad in found[0][2].items() if grad.abs().max() > 1e-6}
    assert moved == set(found[0][2]) - ({"P", "W_Q", "b_Q", "W_K"} if beta == 0 else set())


def test_float32_and_bfloat16_stay_close_to_the_reference():
    (tokens,) = draws(8, (3, 6, 12))
    exact = plainly(layer_of(heads=3), tokens, MASK)
    single = layer_of(heads=3).float()
    torch.testing.assert_close(single(tokens.float(), MASK), exact.float(), atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(single(tokens.float(), MASK), exact.float(), atol=1e-5, rtol=1e-4)
    low = tokens.bfloat16()
    assert single(low).dtype == torch.bfloat16
    torch.testing.assert_close(
        single(low).float(), plainly(layer_of(heads=3), low.double()).float(), atol=0.05, rtol=0.02
    )


@pytest.mark.parametrize("heads", [1, 3])
def test_identity_with_cross_attention_pooling(heads):
    """RwF is multi-head cross-attention with learned queries: values, and gradients of all that both have."""
    layer, width = layer_of(heads=heads), 12
    other = nn.MultiheadAttention(width, heads, batch_first=True, **double)
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([layer.W_Q, layer.W_K, layer.W_V]))
        # a key bias of any size: softmax does not see it, which is why the layer has none
        other.in_proj_bias.copy_(torch.cat([layer.b_Q, 5 * torch.ones(width, **double), layer.b_V]))
        other.out_proj.weight.copy_(layer.W_O)
        other.out_proj.bias.copy_(layer.b_O)
    (tokens, grad) = draws(8, (3, 6, 12), (3, 4, 12))
    mine = layer(tokens, MASK)
    mine.backward(grad)
    queries = layer.P.detach().clone().requires_grad_()
    normal = F.layer_norm(tokens, (width,))
    theirs, weights = other(F.layer_norm(queries, (width,)).expand(3, -1, -1), normal, normal, key_padding_mask=~MASK)
    theirs.backward(grad)
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    assert weights.amax() > 0.3  # far from uniform
    by_part = other.in_proj_weight.grad.chunk(3)
    pairs = [(layer.P, queries.grad), (layer.W_O, other.out_proj.weight.grad), (layer.b_O, other.out_proj.bias.grad)]
    pairs += [(layer.W_Q, by_part[0]), (layer.W_K, by_part[1]), (layer.W_V, by_part[2])]
    pairs += [(layer.b_Q, other.in_proj_bias.grad[:width]), (layer.b_V, other.in_proj_bias.grad[2 * width :])]
    for parameter, expected in pairs:
        torch.testing.assert_close(parameter.grad, expected, atol=1e-11, rtol=1e-9)
    assert other.in_proj_bias.grad[width : 2 * width].abs().max() < 1e-12
    q = F.linear(F.layer_norm(layer.P, (width,)), layer.W_Q, layer.b_Q).unflatten(-1, (heads, -1)).transpose(0, 1)
    k, v = (
        F.linear(normal, *m).unflatten(-1, (heads, -1)).transpose(1, 2) for m in ((layer.W_K,), (layer.W_V, layer.b_V))
    )
    pooled = F.scaled_dot_product_attention(q.expand(3, -1, -1, -1), k, v, MASK[:, None, None], scale=layer.beta)
    torch.testing.assert_close(
        F.linear(pooled.transpose(1, 2).flatten(2), layer.W_O, layer.b_O), mine, atol=1e-12, rtol=0
    )


def test_order_and_padding_do_not_matter():
    layer = layer_of(heads=3)
    (tokens, noise) = draws(8, (3, 6, 12), (3, 6, 12))
    plain = layer(tokens, MASK)
    turned = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(tokens[:, turned], MASK[:, turned]), plain, atol=1e-13, rtol=0)
    assert torch.equal(layer(torch.where(MASK[..., None], tokens, 100 * noise), MASK), plain)
    assert not torch.allclose(layer(torch.where(MASK[..., None], tokens, 100 * noise)), plain, atol=1e-3)
    x = tokens.clone().requires_grad_()
    layer(x, MASK).square().sum().backward()
    assert not x.grad[~MASK].any() and bool((x.grad[MASK].abs().amax(-1) > 0).all())


@pytest.mark.parametrize("train", [("P",), ("W_Q",), ("W_K", "W_O"), ("W_V",)])
def test_only_the_named_parts_train(train):
    layer = RetrievedPrompts(8, 3, train=train)
    names = {name for part in train for name in (part, part.replace("W_", "b_"))} & {
        n for n, _ in layer.named_parameters()
    }
    assert {n for n, _ in layer.trained()} == {n for n, p in layer.named_parameters() if p.requires_grad} == names
    assert (layer.W_V is not None) == ("W_V" in train)


def test_the_identity_as_first_W_V_changes_no_output():
    made = [RetrievedPrompts(8, 3, train=t, generator=torch.Generator().manual_seed(4)) for t in (PARTS, ("P",))]
    (tokens,) = draws(1, (2, 5, 8))
    torch.testing.assert_close(made[0](tokens.float()), made[1](tokens.float()), atol=1e-7, rtol=1e-5)


def test_no_prompts_and_bad_sizes():
    (tokens,) = draws(1, (2, 5, 8))
    assert RetrievedPrompts(8, 0)(tokens).shape == StaticPrompts(8, 0)(tokens).shape == (2, 0, 8)
    for settings_, message in (
        ({"heads": 3}, "heads: found 3, which does not divide the width 8"),
        ({"beta": -1.0}, "beta=-1.0; neither may be below 0"),
        ({"train": ("W_X",)}, "found W_X; known: P, W_Q, W_K, W_V, W_O"),
    ):
        with pytest.raises(BadInput, match=message):
            RetrievedPrompts(8, 3, **settings_)
