"""Worked numbers for the APN layer, values and gradients, on every path; and what the formula implies."""

from __future__ import annotations

import math

import pytest
import torch

from perdure.errors import BadInput
from perdure.layers import PatchLayer
from perdure.memory import read_patches
from perdure.memory.reference import patches as reference

PATHS = ["auto", "reference", "dense", "grouped"]
FAST = ["dense", "grouped"]


def worked(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """C = D = 2, K = 3, r = 1. z = (3, 4): cosines .6, .8 and -.6 with p = (2, 0), (0, 1), (-1, 0)."""
    z = torch.tensor([[3.0, 4.0]], dtype=dtype)
    prototypes = [[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    code = [[0.2, 0.1]]  # u = .6 + .4 = 1
    scale, bias = [[1.0], [0.0], [2.0]], [[0.0], [math.log(3.0)], [0.0]]
    decoders = [[[1.0], [0.0]], [[0.0], [4.0]], [[5.0], [5.0]]]
    return z, [torch.tensor(t, dtype=dtype) for t in (prototypes, code, scale, bias, decoders)]


def case(
    seed: int = 0, n: int = 5, c: int = 6, size: int = 9, r: int = 3, d: int = 4
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return make(n, c), [make(size, c), make(r, c), make(size, r), make(size, r), make(size, d, r)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("path", PATHS)
def test_values_of_the_worked_example(path: str, dtype: torch.dtype) -> None:
    z, tensors = worked(dtype)
    # k = 2, τ = .1: w = softmax(8, 6); φ_1 = σ(0) · 1 with a = 0, b = ln 3 is 3/4, φ_0 = σ(1).
    high = 1 / (1 + math.exp(-2.0))
    expected = 2.0 * torch.tensor([[(1 - high) / (1 + math.exp(-1.0)), high * 3.0]], dtype=dtype)
    y, routing = read_patches(z, *tensors, k=2, tau=0.1, gamma=2.0, path=path)  # type: ignore[arg-type]
    assert routing.indices.tolist() == [[1, 0]] and routing.size == 3
    assert routing.scores is not None
    assert torch.allclose(routing.scores, torch.tensor([[0.8, 0.6]], dtype=dtype), atol=1e-6)
    assert torch.allclose(routing.weights, torch.tensor([[high, 1 - high]], dtype=dtype), atol=1e-6)
    assert y.dtype == dtype and torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradients_equal_finite_differences(path: str, k: int) -> None:
    z, tensors = case(n=3, c=4, size=4, r=2, d=3)
    inputs = [t.requires_grad_() for t in (z, *tensors)]
    assert torch.autograd.gradcheck(
        lambda *t: read_patches(*t, k=k, tau=0.5, gamma=1.3, path=path)[0],  # type: ignore[arg-type]
        inputs,
    )


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize(("k", "shape"), [(1, (7,)), (3, (2, 5)), (9, (4,)), (20, (3, 1, 2)), (2, ()), (2, (0,))])
def test_fast_paths_equal_the_reference(path: str, k: int, shape: tuple[int, ...]) -> None:
    _, tensors = case(seed=k)
    z = torch.randn(*shape, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    found = []
    for function in (lambda *t: reference(*t, k=k, tau=0.07, gamma=0.7), None):
        inputs = [t.clone().requires_grad_() for t in (z, *tensors)]
        if function is None:
            y, routing = read_patches(*inputs, k=k, tau=0.07, gamma=0.7, path=path)  # type: ignore[arg-type]
        else:
            y, routing = function(*inputs)
        grads = torch.autograd.grad((y * torch.arange(1.0, 5.0)).sum(), inputs, allow_unused=True)
        found.append([y, routing.weights, *(torch.zeros_like(t) if g is None else g
                                            for g, t in zip(grads, inputs, strict=True))])  # fmt: skip
    for expected, other in zip(*found, strict=True):
        assert torch.allclose(expected, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("path", PATHS)
def test_a_patch_that_is_not_selected_has_no_part_at_all(path: str) -> None:
    """Locality, exact to zero: in the value and in the gradient."""
    z, tensors = case(n=6)
    leaves = [t.clone().requires_grad_() for t in tensors]
    y, routing = read_patches(z, *leaves, k=2, tau=0.1, path=path)  # type: ignore[arg-type]
    used = torch.zeros(9, dtype=torch.bool)
    used[routing.indices.flatten()] = True
    assert 0 < int(used.sum()) < 9
    y.square().sum().backward()
    for leaf in (leaves[2], leaves[3], leaves[4]):
        assert leaf.grad is not None
        rows = leaf.grad.flatten(1)
        assert (rows[~used] == 0).all() and (rows[used] != 0).any(1).all()
    with torch.no_grad():
        changed = [t.clone() for t in tensors]
        for tensor in changed[2:]:
            tensor[~used] += torch.randn_like(tensor[~used])
        again, _ = read_patches(z, *changed, k=2, tau=0.1, path=path)  # type: ignore[arg-type]
        assert torch.equal(again, y)
        touched = [t.clone() for t in tensors]
        touched[4][int(routing.indices[0, 0])] += 1
        moved = (read_patches(z, *touched, k=2, tau=0.1, path=path)[0] != y).any(-1)  # type: ignore[arg-type]
        assert moved.tolist() == (routing.indices == routing.indices[0, 0]).any(-1).tolist()
        shared = [t.clone() for t in tensors]
        shared[1] += 0.1  # the code is everybody's
        assert (read_patches(z, *shared, k=2, tau=0.1, path=path)[0] != y).any(-1).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(("k", "r"), [(1, 2), (2, 1), (3, 2), (4, 3)])
def test_the_jacobian_has_rank_r_plus_k_minus_one(k: int, r: int) -> None:
    """z moves y through the r numbers of the code and the k - 1 free weights alone."""
    z, tensors = case(seed=3, n=1, c=20, size=12, r=r, d=20)
    jacobian = torch.autograd.functional.jacobian(lambda x: read_patches(x, *tensors, k=k, tau=0.3)[0], z[0])
    sizes = torch.linalg.svdvals(jacobian)  # type: ignore[arg-type]
    assert int((sizes > 1e-9 * sizes[0]).sum()) == r + k - 1
    y, routing = read_patches(z, *tensors, k=k, tau=0.3)
    columns = tensors[4][routing.indices[0]].transpose(0, 1).flatten(1)  # [D, k r]
    residual = y[0] - columns @ torch.linalg.lstsq(columns, y[0, :, None]).solution[:, 0]
    assert residual.norm() < 1e-9 * y.norm()


@pytest.mark.parametrize("k", [1, 3, 9])
def test_drift_is_bounded_by_what_moved(k: int) -> None:
    """‖δy‖ ≤ γ Σ w_i ‖δU_i‖₂ ‖u‖ where the decoders alone move, since |φ| ≤ |u|."""
    z, tensors = case(seed=k, n=50)
    moved = [*tensors[:4], tensors[4] + 0.3 * torch.randn_like(tensors[4])]
    before, routing = read_patches(z, *tensors, k=k, tau=0.07, gamma=1.5)
    after, _ = read_patches(z, *moved, k=k, tau=0.07, gamma=1.5)
    norms = torch.linalg.matrix_norm(moved[4] - tensors[4], ord=2)
    bound = 1.5 * (routing.weights * norms[routing.indices]).sum(-1) * (z @ tensors[1].t()).norm(dim=-1)
    drift = (after - before).norm(dim=-1)
    assert (drift > 0).all() and (drift <= bound).all()


def test_routing_knows_directions_alone_and_keeps_its_set_within_the_margin() -> None:
    z, tensors = case(n=40)
    _, routing = read_patches(z, *tensors, k=3, tau=0.07)
    longer = [tensors[0] * torch.rand(9, 1, dtype=torch.float64).add(0.5), *tensors[1:]]
    _, scaled = read_patches(z * 7, *longer, k=3, tau=0.07)
    assert torch.equal(scaled.indices, routing.indices)
    assert torch.allclose(scaled.weights, routing.weights) and torch.allclose(routing.weights.sum(-1), z.new_ones(40))
    _, all_scores = read_patches(z, *tensors, k=9, tau=0.07)
    assert all_scores.scores is not None
    margin = all_scores.scores[:, 2] - all_scores.scores[:, 3]
    unit = z / z.norm(dim=-1, keepdim=True)
    step = torch.randn_like(unit)
    near = unit + 0.2 * margin[:, None] * step / step.norm(dim=-1, keepdim=True)
    near = near / near.norm(dim=-1, keepdim=True)
    safe = margin > 2 * (near - unit).norm(dim=-1)
    assert safe.any()
    _, close = read_patches(near, *tensors, k=3, tau=0.07)
    assert torch.equal(close.indices[safe].sort(-1).values, routing.indices[safe].sort(-1).values)


def test_equal_scores_go_to_the_lowest_number() -> None:
    z, tensors = case(n=4)
    tensors[0][:] = torch.eye(6)[2]  # products with ones and zeros are equal to the bit
    for path in PATHS:
        _, routing = read_patches(z, *tensors, k=3, tau=0.07, path=path)  # type: ignore[arg-type]
        assert routing.indices.tolist() == [[0, 1, 2]] * 4
        assert torch.allclose(routing.weights, torch.full_like(routing.weights, 1 / 3))


@pytest.mark.parametrize("path", PATHS)
def test_half_precision_routes_in_single(path: str) -> None:
    z, tensors = case(n=4)
    small = [t.float() for t in tensors]
    expected, _ = read_patches(z.bfloat16().float(), *small, k=2, tau=0.1, path=path)  # type: ignore[arg-type]
    y, routing = read_patches(z.bfloat16(), *small, k=2, tau=0.1, path=path)  # type: ignore[arg-type]
    assert y.dtype == torch.bfloat16 and routing.weights.dtype == torch.float32
    assert torch.allclose(y.float(), expected, rtol=1e-2)


# ---- the layer
def test_the_layer_begins_as_released() -> None:
    torch.manual_seed(0)
    layer = PatchLayer(64, patches=128, k=4, rank=16, depth=6)
    spread = {"prototypes": 0.02, "code": 0.02, "gate_scale": 0.02, "decoders": 0.02 / math.sqrt(12)}
    for name, std in spread.items():
        tensor = getattr(layer, name).detach()
        assert float(tensor.std()) == pytest.approx(std, rel=0.1) and abs(float(tensor.mean())) < std / 10
    assert (layer.gate_bias == 0).all()
    sizes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert sizes == {
        "prototypes": (128, 64), "code": (16, 64), "gate_scale": (128, 16), "gate_bias": (128, 16),
        "decoders": (128, 64, 16),
    }  # fmt: skip
    assert (PatchLayer(8, patches=4, k=1, rank=2).decoders == 0).all()


def test_dropout_falls_on_the_output_in_training_only() -> None:
    torch.manual_seed(0)
    layer, z = PatchLayer(16, patches=8, k=2, rank=4, depth=1, dropout=0.5), torch.randn(200, 16)
    whole = layer.eval()(z)
    dropped = layer.train()(z)
    silent = dropped == 0
    assert 0.45 < float(silent.double().mean()) < 0.55
    assert torch.allclose(dropped[~silent], 2 * whole[~silent])


def test_settings_out_of_range_are_refused() -> None:
    for settings, words in [({"patches": 0}, "patches: found 0"), ({"rank": 0}, "rank: found 0"),
                            ({"k": 5, "patches": 4}, "more than the 4 patches"), ({"tau": 0.0}, "tau: found"),
                            ({"dropout": 1.0}, "dropout: found")]:  # fmt: skip
        with pytest.raises(BadInput, match=words):
            PatchLayer(8, **{"patches": 4, "k": 2, "rank": 2, **settings})  # type: ignore[arg-type]
    z, tensors = case()
    for wrong, words in [({0: tensors[0][:, :3]}, "features"), ({2: tensors[2][:3]}, "sizes"), ({4: z}, "decoders")]:
        changed = [wrong.get(i, t) for i, t in enumerate(tensors)]
        with pytest.raises(ValueError, match=words):
            read_patches(z, *changed, k=2, tau=0.1)
    for settings, words in [({"k": 0, "tau": 1.0}, "k=0"), ({"k": 1, "tau": 0.0}, "tau"),
                            ({"k": 1, "tau": 1.0, "path": "quick"}, "quick")]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            read_patches(z, *tensors, **settings)
