"""InfLoRA: the subspace against a plain reference, the designed rows, and what old inputs see of a new branch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from perdure.errors import BadInput, ProtocolRefused
from perdure.learner import Learner
from perdure.memory import Subspace, designed_rows, update_subspace
from tests.conformance import cases

SPEC: dict[str, Any] = {"inflora": {"rank": 2, "energy": 0.8}}


def method_of(learner: Any) -> Any:
    return learner.methods[0]


def diagonal(*values: float) -> torch.Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def projector(space: Subspace) -> torch.Tensor:
    """Onto the old inputs, whichever basis is kept."""
    inside = space.basis.double() @ space.basis.double().t()
    return torch.eye(len(inside), dtype=torch.float64) - inside if space.retain else inside


def moments(count: int, d: int, seed: int) -> list[torch.Tensor]:
    """Second moments with falling spectra along directions of their own."""
    draw = torch.Generator().manual_seed(seed)
    scale = 0.7 ** torch.arange(d, dtype=torch.float64)
    made = []
    for _ in range(count):
        turn = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64)).Q
        made.append((turn * scale) @ turn.t())
    return made


# ---- DualGPM
def test_the_subspace_by_hand() -> None:
    # shares of sigma squared: 81/98, 16/98, 1/98; below .95 stays the first alone, for the second reaches .99
    first = update_subspace(None, diagonal(9, 4, 1, 0), 0.95)
    assert first is not None and not first.retain and first.free() == 3
    assert first.basis.abs().tolist() == [[1], [0], [0], [0]]
    # of 1, 9, 4: 1/98 is inside; 81/98 and then 16/98 come in, and 3 of 4 directions turn into the one that is left
    second = update_subspace(first, diagonal(1, 9, 4, 0), 0.95)
    assert second is not None and second.retain and second.free() == 1
    assert second.basis.abs().tolist() == [[0], [0], [0], [1]]
    same = update_subspace(second, diagonal(3, 2, 1, 0.5), 0.95)
    assert same is second, "14 of 14.25 is inside already"
    third = update_subspace(second, diagonal(1, 0, 0, 5), 0.95)
    assert third is not None and third.retain and third.free() == 0 and third.basis.shape == (4, 0)
    assert torch.equal(third.outside(diagonal(1, 2, 3, 4)), torch.zeros(4, 4, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(4))
def test_the_subspace_against_a_plain_gpm(seed: int) -> None:
    """The release's steps in numpy, never turning to the complement."""
    space: Subspace | None = None
    basis = np.zeros((10, 0))
    turned = False
    for number, moment in enumerate(moments(5, 10, seed)):
        energy = 0.8 + 0.03 * number
        space = update_subspace(space, moment, energy)
        c = moment.numpy()
        total = (np.linalg.svd(c)[1] ** 2).sum()
        left, sizes, _ = np.linalg.svd(c - basis @ basis.T @ c)
        if number == 0:
            taken = max(1, int((np.cumsum(sizes**2 / total) < energy).sum()))
        else:
            inside, taken = (total - (sizes**2).sum()) / total, 0
            while inside < energy:
                inside += sizes[taken] ** 2 / total
                taken += 1
        basis = np.hstack([basis, left[:, :taken]])
        assert space is not None
        assert np.allclose(projector(space).numpy(), basis @ basis.T, atol=1e-5)
        assert space.basis.shape[1] <= 5 and space.free() == 10 - basis.shape[1]
        turned |= space.retain
    assert turned, "the complement must have been kept, or its branch was not looked at"


def test_an_input_that_never_came_changes_nothing_and_bad_values_are_named() -> None:
    zero = torch.zeros(3, 3)
    assert update_subspace(None, zero, 0.9) is None
    old = update_subspace(None, diagonal(1, 0, 0), 0.9)
    assert update_subspace(old, zero, 0.9) is old
    assert not designed_rows(zero, None, 2).any()
    for energy in (0.0, 1.01):
        with pytest.raises(ValueError, match="energy: found"):
            update_subspace(None, diagonal(1, 1, 1), energy)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="moment: found a value that is not finite"):
            update_subspace(None, diagonal(1, bad, 1), 0.9)
        with pytest.raises(ValueError, match="moment: found a value that is not finite"):
            designed_rows(diagonal(1, bad, 1), None, 1)
    with pytest.raises(ValueError, match="rank: found 4; expected 1 to 3"):
        designed_rows(diagonal(1, 1, 1), None, 4)


# ---- the designed rows
def test_the_rows_by_hand() -> None:
    third = 1 / 3**0.5
    found = designed_rows(diagonal(1, 9, 4), None, 2)
    assert torch.allclose(found, torch.tensor([[0, third, 0], [0, 0, third]]))
    old = Subspace(torch.tensor([[0.0], [1], [0]]), False)
    assert torch.allclose(designed_rows(diagonal(1, 9, 4), old, 2), torch.tensor([[0, 0, third], [third, 0, 0]]))
    kept = Subspace(torch.tensor([[1.0], [0], [0]]), True)  # all but the first direction is old
    assert torch.allclose(designed_rows(diagonal(1, 9, 4), kept, 2), torch.tensor([[third, 0, 0], [0, 0, 0]]))


@pytest.mark.parametrize("seed", range(3))
def test_the_rows_are_orthonormal_outside_the_old_inputs_and_hold_the_most(seed: int) -> None:
    first, second, third = moments(3, 10, seed)
    old = update_subspace(update_subspace(None, first, 0.9), second, 0.9)
    assert old is not None
    rows = designed_rows(third, old, 3).double()
    inside = projector(old)
    assert torch.allclose(3 * rows @ rows.t(), torch.eye(3, dtype=torch.float64), atol=1e-5)
    assert (rows @ inside).abs().max() < 1e-6
    # the leading eigenvectors of P C C P span the same space
    outside = torch.eye(10, dtype=torch.float64) - inside
    vectors = torch.linalg.eigh(outside @ third @ third @ outside).eigenvectors[:, -3:]
    assert torch.allclose(3 * rows.t() @ rows, vectors @ vectors.t(), atol=1e-4)


# ---- in the loop
def test_only_b_trains_and_all_that_is_old_stands_still() -> None:
    learner = cases.build_learner("bert", SPEC, weight_decay=0.1)
    made, method = cases.experiences("bert"), method_of(learner)
    old: dict[str, torch.Tensor] = {}
    designed: dict[str, torch.Tensor] = {}

    def on_step(loop: Any, _: Any) -> None:
        assert {name.rpartition(".")[2] for name, _ in loop.named_trainable() if name.startswith("method")} == {"B"}
        for name, branch in method.branches.items():
            if loop.position.step == 1:
                designed[name] = branch.bank.new_keys.detach().clone()
                assert branch.bank.new_keys.abs().max() > 0
            assert torch.equal(branch.bank.new_keys, designed[name]), "the optimizer must not know A"

    for number, experience in enumerate(made):
        learner.learn(experience, on_step=on_step)
        for name, branch in method.branches.items():
            bank: Any = branch.bank
            assert bank.frozen_size > 2 * number and bank.new_size == 0, "each experience has left a branch"
            for key, rows in ((f"{name}/A", bank.frozen_keys), (f"{name}/B", bank.frozen_values)):
                before = old[key] if key in old else rows[:0]
                assert torch.equal(rows[: len(before)], before)
            old[f"{name}/A"], old[f"{name}/B"] = bank.frozen_keys.clone(), bank.frozen_values.clone()
    assert 0 < method.plasticity()["free_directions"] < 1


def test_the_rows_come_from_the_inputs_of_the_new_experience_and_avoid_the_old_ones() -> None:
    learner = cases.build_learner("bert", SPEC)
    made, method = cases.experiences("bert"), method_of(learner)
    learner.learn(made[0])
    site = next(site for site in method._sites if site.name == "1.key")
    kept = {key: (basis.clone(), method.values["retain"][key[6:]]) for key, basis in method.tensors.items()}
    assert set(kept) == {"basis/0.key", "basis/1.key"}, "key and value read one tensor"
    inputs: list[torch.Tensor] = []
    handle = site.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    masks = []
    with torch.no_grad():
        for batch in learner.batches(made[1].train, {}, unlabelled=True):
            masks.append(batch.inputs["attention_mask"].bool())
            learner.forward(batch)
    handle.remove()
    x = torch.cat([one[mask] for one, mask in zip(inputs, masks, strict=True)]).double()
    space = Subspace(*kept["basis/1.key"])
    wanted = designed_rows(x.t() @ x / len(x), space, 2)
    found: list[torch.Tensor] = []

    def on_step(loop: Any, _: Any) -> None:
        if not found:
            found.extend(method.branches[name].bank.new_keys.detach().clone() for name in ("1.key", "1.value"))

    learner.learn(made[1], on_step=on_step)
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], wanted, atol=1e-3)
    assert (found[0].double() @ projector(space)).abs().max() < 1e-6


def test_old_inputs_do_not_answer_a_new_branch() -> None:
    """What M holds of an old input gives nothing; with rows drawn at random it does."""
    learner = cases.build_learner("bert", SPEC, epochs=4)
    made, method = cases.experiences("bert"), method_of(learner)
    learner.learn(made[0])
    spaces = {name[6:]: Subspace(basis.clone(), method.values["retain"][name[6:]])
              for name, basis in method.tensors.items()}  # fmt: skip
    before = {name: branch.bank.frozen_size for name, branch in method.branches.items()}
    learner.learn(made[1])
    for name, space in spaces.items():
        bank = method.branches[name].bank
        new = slice(before[name], None)
        update = (bank.frozen_values[new].t() @ bank.frozen_keys[new]).double()
        assert update.norm() > 1e-2, "the branch must have learnt"
        assert (update @ projector(space)).norm() < 1e-5 * update.norm()


def test_the_share_grows_over_the_experiences() -> None:
    plan = {"rank": 2, "energy": 0.8, "final_energy": 1.0, "experiences": 4}
    for settings, wanted in ((plan, [0.8, 0.85, 0.9, 0.95, 0.95]), ({"rank": 2, "energy": 0.8}, [0.8] * 5)):
        learner = cases.build_learner("bert", {"inflora": settings}, max_steps=1)
        found = []
        for experience in cases.experiences("bert", 5):
            learner.learn(experience)
            found.append(method_of(learner)._share())
        assert found == pytest.approx(wanted)


def test_extra_passes_are_counted_and_the_last_experience_protects_nothing() -> None:
    learner = cases.build_learner("bert", SPEC)
    for experience, wanted in zip(cases.experiences("bert"), (2, 4, 5), strict=True):
        learner.learn(experience)
        assert learner.counters.extra_passes == wanted


def test_bad_input() -> None:
    with pytest.raises(BadInput, match=r"method\.inflora\.rank: is 17, but \S+ has 16 inputs.*lower it"):
        cases.build_learner("bert", {"inflora": {"rank": 17}})
    with pytest.raises(BadInput, match="final_energy is 0.7, below energy 0.95"):
        cases.build_learner("bert", {"inflora": {"final_energy": 0.7, "experiences": 5}})
    with pytest.raises(BadInput, match=r"method\.inflora\.energy"):
        cases.build_learner("bert", {"inflora": {"energy": 1.0}})
    model, processor = cases.build_host("bert")
    with pytest.raises(ProtocolRefused, match="boundaries"):
        Learner(model, processor, method="inflora", protocol={"boundaries": "none"})
