from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseprune.nn import SparseLinear
from sparseprune.pruning import NM, Block, collect_inputs, collect_outputs, compensate, refit_survivors
from sparseprune.runner.text_encoder import TextEncoder


def correlated(count, width, rank=6, seed=0, noise=0.1):
    """Inputs that lie close to a plane, off the origin, as hidden states do."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, width, generator=torch.Generator().manual_seed(99))
    x = torch.randn(count, rank, generator=generator) @ basis / rank**0.5
    return x + noise * torch.randn(count, width, generator=generator) + 0.3


def weight(rows=24, cols=32, seed=1):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) / cols**0.5


def held_out_error(w, fitted, x):
    shift = 0 if fitted.bias_shift is None else fitted.bias_shift
    got = x @ fitted.effective_weight().T + shift
    return float((got - x @ w.T).square().sum() / (x @ w.T).square().sum())


@pytest.mark.parametrize("density", [0.05, 0.1, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_budget_holds_and_the_error_is_the_one_reported(density, has_bias):
    w, x, held = weight(), correlated(400, 32), correlated(200, 32, seed=5)
    fitted = compensate(w, x, density, has_bias=has_bias, valid_inputs=held)
    budget = int(density * w.numel() + 1e-9)
    nonzero = int((fitted.weight != 0).sum())
    extra = 0 if fitted.low_rank_a is None else fitted.low_rank_a.numel() + fitted.low_rank_b.numel()
    if not has_bias and fitted.bias_shift is not None:
        extra += 24
    assert nonzero + extra <= fitted.parameters <= fitted.budget == budget
    assert not (fitted.weight != 0)[~fitted.mask].any()
    assert fitted.errors[fitted.chosen] == min(fitted.errors.values()) <= fitted.errors["mask"]
    assert held_out_error(w, fitted, held) == pytest.approx(fitted.errors[fitted.chosen], rel=1e-2, abs=1e-5)
    assert fitted.chosen in str(fitted)
    if density == 1.0:
        assert fitted.rank == 0 and torch.equal(fitted.weight, w)


def test_a_low_rank_remainder_is_worth_its_parameters():
    generator = torch.Generator().manual_seed(3)
    dense = torch.randn(24, 1, generator=generator) @ torch.randn(1, 32, generator=generator)
    spikes = torch.zeros(24, 32).masked_fill(torch.rand(24, 32, generator=generator) < 0.05, 4.0)
    x = torch.randn(600, 32, generator=generator)
    fitted = compensate(dense + spikes, x, 0.25, survivors=False)
    assert fitted.rank == 1 and fitted.low_rank_a.shape == (1, 32) and fitted.low_rank_b.shape == (24, 1)
    assert fitted.errors["rank 1"] < 0.2 * min(fitted.errors["mask"], fitted.errors["bias"])


def test_rank_zero_wins_where_there_is_nothing_of_low_rank():
    generator = torch.Generator().manual_seed(4)
    sparse = torch.randn(24, 32, generator=generator) * (torch.rand(24, 32, generator=generator) < 0.2)
    fitted = compensate(sparse, torch.randn(600, 32, generator=generator), 0.2)
    assert fitted.rank == 0 and fitted.low_rank_a is None and fitted.low_rank_b is None
    assert any(name.startswith("rank") for name in fitted.errors)


def test_the_truncated_svd_is_the_weighted_optimum():
    from sparseprune.pruning.compensation.refit import low_rank_factors as _low_rank

    w, x = weight(), correlated(300, 32)
    h = (x.T @ x / len(x) + 0.01 * torch.eye(32)).double()
    root = torch.linalg.cholesky(h)
    a, b = _low_rank(w.double(), root, 3)
    values = torch.linalg.svdvals(w.double() @ root)
    missing = (w.double() - b @ a) @ root
    assert float(missing.square().sum()) == pytest.approx(float(values[3:].square().sum()), rel=1e-6)


def test_refitted_survivors_are_the_least_squares_solution():
    w, x = weight(9, 13).double(), correlated(200, 13, rank=5).double()
    h = x.T @ x / len(x) + 0.01 * torch.eye(13, dtype=torch.float64)
    mask = torch.rand(9, 13, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[0], mask[1] = False, True
    fitted = refit_survivors(w, mask, h, iterations=60)
    for row in range(9):
        kept = mask[row].nonzero().flatten()
        expected = torch.zeros(13, dtype=torch.float64)
        if len(kept):
            expected[kept] = torch.linalg.solve(h[kept][:, kept], (h @ w[row])[kept])
        torch.testing.assert_close(fitted[row], expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(fitted[0], torch.zeros(13, dtype=torch.float64))


def test_refitting_never_ends_worse_even_when_cut_short():
    w, x = weight(), correlated(300, 32)
    h = x.T @ x / len(x) + 0.001 * torch.eye(32)
    mask = torch.rand(24, 32, generator=torch.Generator().manual_seed(2)) < 0.2

    def loss(fit):
        return float((((w - fit) @ h) * (w - fit)).sum())

    losses = [loss(refit_survivors(w, mask, h, iterations=n)) for n in (0, 1, 3, 10, 40)]
    assert losses[0] == pytest.approx(loss(w * mask)) and losses == sorted(losses, reverse=True)


def test_a_given_mask_is_only_thinned():
    w, x = weight(), correlated(400, 32)
    mask = torch.rand(24, 32, generator=torch.Generator().manual_seed(2)) < 0.4
    for ranks in ([], [2]):
        fitted = compensate(w, x, mask=mask, ranks=ranks)
        assert fitted.budget == int(mask.sum()) and not (fitted.mask & ~mask).any()
    scores = torch.arange(24.0 * 32).reshape(24, 32)
    fitted = compensate(w, x, 0.5, scores=scores, ranks=[])
    assert fitted.mask.flatten().nonzero().flatten().tolist() == list(range(384, 768))


def test_blocks_stay_whole():
    fitted = compensate(weight(), correlated(400, 32), 0.33, granularity=Block(8, 1))
    assert set(fitted.mask.reshape(3, 8, 32).sum(1).flatten().tolist()) <= {0, 8}
    assert fitted.budget == int(0.33 * 768 / 8) * 8 and fitted.parameters <= fitted.budget


def test_the_sparse_layer_computes_the_same(close):
    w, x = weight(), correlated(400, 32)
    fitted = compensate(w, x, 0.3, ranks=[2])
    forced = min((n for n in fitted.errors if n.startswith("rank")), key=fitted.errors.__getitem__)
    assert forced == "rank 2"
    linear = nn.Linear(32, 24)
    with torch.no_grad():
        linear.weight.copy_(fitted.weight)
        if fitted.bias_shift is not None:
            linear.bias += fitted.bias_shift
    layer = SparseLinear.from_linear(linear, layout="csr")
    layer.set_low_rank_(fitted.low_rank_a, fitted.low_rank_b)
    close(layer(x[:5]), x[:5] @ fitted.effective_weight().T + linear.bias)


def test_the_same_inputs_give_the_same_fit_and_no_random_state_is_used():
    w, x = weight(), correlated(400, 32)
    before = torch.random.get_rng_state()
    one, two = compensate(w, x, 0.3), compensate(w, x, 0.3)
    assert torch.equal(one.weight, two.weight) and one.errors == two.errors
    assert torch.equal(torch.random.get_rng_state(), before)
    half = compensate(w.bfloat16(), x, 0.3)
    assert half.weight.dtype == torch.bfloat16


class Half(nn.ModuleList):
    """Two Linears, of which it calls the first."""

    def __init__(self):
        super().__init__([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        return self[0](x)


@pytest.mark.parametrize("centred", [True, False])
def test_outputs_that_no_weight_in_use_gives_are_learned(centred):
    """The outputs wanted come from another weight on the same mask: it is found, and its bias."""
    mask = torch.rand(24, 32, generator=torch.Generator().manual_seed(4)) < 0.4
    used, other = weight() * mask, weight(seed=2) * mask
    x, held = correlated(400, 32, rank=20), correlated(200, 32, rank=20, seed=5)
    constant = 0.7 if centred else 0.0
    arguments = {"mask": mask, "outputs": x @ other.T + constant, "ranks": (), "bias_shift": centred, "damping": 1e-6}
    fitted = compensate(used, x, valid_inputs=held, valid_outputs=held @ other.T + constant, **arguments)
    assert fitted.chosen == ("survivors and bias" if centred else "survivors")
    torch.testing.assert_close(fitted.weight, other, rtol=0, atol=1e-2)
    if centred:
        torch.testing.assert_close(fitted.bias_shift, torch.full((24,), 0.7), rtol=0, atol=2e-2)
    assert fitted.errors[fitted.chosen] < 1e-3 < fitted.errors["mask"]
    wanted = held @ other.T + constant
    size = wanted.square().sum()
    assert fitted.errors["mask"] == pytest.approx(float((wanted - held @ used.T).square().sum() / size), rel=1e-4)

    # Where the weights in use give what is wanted already, they stay as they are, to the bit.
    same = compensate(used, x, outputs=x @ used.T, mask=mask)
    assert same.chosen == "mask" and torch.equal(same.weight, used) and same.errors["mask"] < 1e-10


def test_a_low_rank_term_adds_what_the_outputs_want_beside_the_weights_in_use():
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(24, 32, generator=generator) < 0.4
    used = weight() * mask
    term = torch.randn(24, 1, generator=generator) @ torch.randn(1, 32, generator=generator)
    x = torch.randn(600, 32, generator=generator)
    options = {"survivors": False, "bias_shift": False, "ranks": (1, 2)}
    fitted = compensate(used, x, mask=mask, outputs=x @ (used + term).T, **options)
    assert fitted.chosen == "rank 1" and fitted.errors["rank 1"] < 0.05 * fitted.errors["mask"]
    assert torch.equal(fitted.weight, used * fitted.mask) and int(fitted.mask.sum()) == int(mask.sum()) - 56


def test_damping_holds_on_to_the_weights_in_use_where_the_inputs_say_nothing():
    mask = torch.ones(24, 32, dtype=torch.bool)
    used, x = weight(), correlated(64, 32, rank=3, noise=0.0)
    other = x @ weight(seed=2).T
    fitted = compensate(used, x, mask=mask, outputs=other, bias_shift=False, ranks=(), damping=1e-3)
    assert fitted.chosen == "survivors"
    away = torch.linalg.svd(x)[2][4:]  # directions that no input has: three of a plane, and the offset
    torch.testing.assert_close(fitted.weight @ away.T, used @ away.T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("given", [False, True], ids=["outputs of the weight", "outputs given"])
def test_inputs_that_hardly_vary_about_a_large_mean(given):
    """The survivors are those of plain least squares on the centred rows, in float64, and no fit breaks off."""
    x = 1e3 + 1e-3 * correlated(400, 13, rank=5)
    w, other = weight(9, 13), weight(9, 13, seed=2)
    mask = torch.rand(9, 13, generator=torch.Generator().manual_seed(4)) < 0.5
    outputs = (x.double() @ other.double().T).float() if given else None
    arguments = {"mask": mask, "outputs": outputs, "damping": 1e-6, "valid_inputs": x, "valid_outputs": outputs}
    fitted = compensate(w * mask if given else w, x, ranks=(), **arguments)
    assert fitted.chosen == "survivors and bias"
    rows, means = x.double() - x.double().mean(0), x.double().mean(0)
    wanted = outputs.double() if given else x.double() @ w.double().T
    for row, kept in enumerate(mask):
        expected = torch.linalg.lstsq(rows[:, kept], (wanted - wanted.mean(0))[:, row]).solution
        torch.testing.assert_close(fitted.weight[row, kept].double(), expected, rtol=0, atol=2e-3)
    shift = wanted.mean(0) - fitted.weight.double() @ means
    torch.testing.assert_close(fitted.bias_shift.double(), shift, rtol=1e-6, atol=0)
    left = wanted - x.double() @ fitted.weight.double().T - fitted.bias_shift.double()
    error = float(left.square().sum() / wanted.square().sum())
    assert fitted.errors[fitted.chosen] == pytest.approx(error, rel=0.05)
    tried = compensate(w, x, **arguments, survivors=False)
    assert any(name.startswith("rank") for name in tried.errors)


@pytest.mark.parametrize("value", [0.0, 1e3])
def test_inputs_that_do_not_vary(value):
    w, x = weight(), torch.full((64, 32), value)
    fitted = compensate(w, x, 0.3)
    assert fitted.weight.isfinite().all() and all(error == error for error in fitted.errors.values())
    if value:
        assert fitted.bias_shift is not None or fitted.rank
    assert fitted.errors[fitted.chosen] < 1e-9


def test_too_little_damping_for_float32_is_said():
    w, x = weight(), correlated(400, 32, rank=3, noise=0.0)
    with pytest.raises(ValueError, match="positive definite with damping 1e-12; raise damping"):
        compensate(w, x, 0.5, damping=1e-12)


def test_outputs_are_collected_where_the_inputs_are():
    torch.manual_seed(0)
    model = TextEncoder(30, 3, hidden=8, ffn=16, layers=1, heads=2)
    ids = torch.randint(1, 30, (4, 6))
    batches = [{"input_ids": ids, "attention_mask": (torch.arange(6) < 4).expand(4, 6)}] * 3
    names = ["layers.0.ffn.contract", "layers.0.query", "classifier"]
    for rows in (4096, 9):
        read = collect_inputs(model, names, batches, rows=rows)
        given = collect_outputs(model, names[1:], batches, rows=rows)
        for name in names[1:]:
            torch.testing.assert_close(model.get_submodule(name)(read[name]), given[name])


def test_inputs_are_collected_without_padding():
    torch.manual_seed(0)
    model = TextEncoder(30, 3, hidden=8, ffn=16, layers=1, heads=2).train()
    ids = torch.randint(1, 30, (4, 6))
    batches = [{"input_ids": ids, "attention_mask": (torch.arange(6) < 4).expand(4, 6), "labels": torch.zeros(4)}] * 3
    names = ["layers.0.query", "layers.0.ffn.contract", "classifier"]
    found = collect_inputs(model, names, batches)
    assert {f: tuple(x.shape) for f, x in found.items()} == {
        "layers.0.query": (48, 8), "layers.0.ffn.contract": (48, 16), "classifier": (12, 8),
    }  # fmt: skip
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert len(collect_inputs(model, names, [ids, (ids, None)], rows=10)["layers.0.query"]) == 10
    with pytest.raises(ValueError, match="never reach 1"):
        collect_inputs(Half(), ["1"], [torch.ones(2, 4)])
    with pytest.raises(ValueError, match="at least one batch"):
        collect_inputs(model, names, [])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"density": None}, "density or mask"),
        ({"mask": torch.ones(24, 32, dtype=torch.bool)}, "density or mask"),
        ({"density": 0.0}, "density expected in"),
        ({"damping": -0.1}, "damping expected >= 0, got -0.1"),
        ({"density": None, "mask": torch.ones(2, 2, dtype=torch.bool)}, "mask expected bool"),
        ({"granularity": NM(2, 4)}, "its count is not free"),
        ({"inputs": torch.ones(50, 31)}, r"inputs \[..., K\]"),
        ({"inputs": torch.full((50, 32), float("nan"))}, "expected finite values"),
        ({"inputs": torch.ones(7, 32)}, "at least 8 inputs"),
        ({"valid_inputs": torch.ones(7, 31)}, "valid_inputs expected"),
        ({"outputs": torch.ones(50, 23)}, r"outputs expected \[38, 24\], one row for each input, got \[38, 23\]"),
        ({"outputs": torch.ones(50, 24), "valid_inputs": torch.ones(7, 32)}, "got none"),
        ({"outputs": torch.full((50, 24), float("inf"))}, "outputs expected finite values"),
        ({"ranks": [40]}, r"ranks expected in \[0, 24\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"weight": weight(), "inputs": correlated(50, 32), "density": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        compensate(**arguments)
