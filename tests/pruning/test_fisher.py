"""The criterion of second order, beside the inverse written down and a minimum searched for."""

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.pruning import Fisher, Plan, PruneContext, make_criterion, prune_


def context_of(linears):
    weights = {fqn: linear.weight.detach() for fqn, linear in linears.items()}
    return PruneContext(nn.Module(), linears, weights, Plan.build(nn.ModuleDict(linears), linears), 0.5)


def shown(criterion, linear, gradients):
    return shown_to(criterion, linear, gradients, context_of({"a": linear}))


def shown_to(criterion, linear, gradients, context):
    for gradient in gradients:
        criterion.observe({"a": linear.weight.detach()}, {"a": gradient})
    return criterion.scores(context)["a"]


def blocks_of(gradients, row, start, block, damp):
    """Block of F from the definition, in float64, padded with what is beyond the row."""
    g = torch.stack([gradient[row, start : start + block] for gradient in gradients]).double()
    size = sum(gradient.double().square().mean() for gradient in gradients) / len(gradients)
    return g.T @ g / len(gradients) + damp * size * torch.eye(g.shape[1], dtype=torch.float64)


@pytest.mark.parametrize(("rows", "columns", "block"), [(3, 8, 4), (5, 13, 4), (1, 1, 32), (7, 40, 1), (2, 5, 5)])
def test_scores_are_those_of_the_inverse_written_down(rows, columns, block):
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows)
    gradients = [torch.randn(rows, columns) for _ in range(11)]
    found = shown(Fisher(block=block, damp=0.3), linear, gradients)
    assert found.shape == linear.weight.shape
    for row in range(rows):
        for start in range(0, columns, block):
            inverse = torch.linalg.inv(blocks_of(gradients, row, start, block, 0.3)).diagonal()
            weight = linear.weight[row, start : start + block].detach().double()
            here = found[row, start : start + block].double()
            torch.testing.assert_close(here, weight**2 / (2 * inverse), rtol=1e-4, atol=1e-9)


def test_a_score_is_what_the_loss_rises_by_when_the_others_of_its_block_make_up_for_it():
    torch.manual_seed(1)
    linear, block = nn.Linear(6, 1), 6
    gradients = [torch.randn(1, 6) * torch.tensor([1.0, 1, 3, 1, 0.1, 1]) + torch.randn(1, 1) for _ in range(40)]
    found = shown(Fisher(block=block, damp=0.01), linear, gradients)[0]
    curvature = blocks_of(gradients, 0, 0, block, 0.01).float()
    for gone in range(6):
        change = torch.zeros(6)
        change[gone] = -linear.weight[0, gone].item()
        free = [i for i in range(6) if i != gone]
        change[free] = torch.linalg.solve(curvature[free][:, free], -curvature[free, gone] * change[gone])
        torch.testing.assert_close(found[gone], change @ curvature @ change / 2, rtol=1e-3, atol=1e-7)


def test_only_the_last_steps_are_remembered():
    torch.manual_seed(2)
    linear = nn.Linear(8, 4)
    early, late = [10 * torch.randn(4, 8) for _ in range(5)], [torch.randn(4, 8) for _ in range(400)]
    forgot = shown(Fisher(block=4, window=20), linear, early + late)
    never = shown(Fisher(block=4, window=20), linear, late)
    torch.testing.assert_close(forgot, never, rtol=1e-3, atol=1e-7)
    assert not torch.allclose(shown(Fisher(block=4, window=10_000), linear, early + late), never, rtol=0.1)


def test_an_inverse_is_made_anew_soon_among_the_first_steps_and_then_every_so_often():
    torch.manual_seed(3)
    linear, criterion = nn.Linear(8, 4), Fisher(block=4, refresh=4)
    anew, before = [], None
    for step in range(1, 17):
        found = shown(criterion, linear, [torch.randn(4, 8)])
        if before is None or not torch.equal(found, before):
            anew.append(step)
        before = found
    assert anew == [1, 2, 4, 8, 12, 16]


def test_where_no_gradient_was_the_order_is_that_of_magnitude():
    linear = nn.Linear(8, 4)
    for size in (0.0, 1e-25):  # whose square is 0
        found = shown(Fisher(), linear, [torch.full((4, 8), size)])
        assert torch.equal(found.flatten().argsort(), linear.weight.abs().flatten().argsort())
    empty = nn.Linear(8, 4)
    empty.weight = nn.Parameter(torch.empty(0, 8))
    assert shown(Fisher(), empty, [torch.empty(0, 8)]).shape == (0, 8)


def test_a_layer_without_a_gradient_is_not_above_those_with_one():
    torch.manual_seed(6)
    linears, criterion = {name: nn.Linear(8, 4) for name in "ab"}, Fisher(block=4, damp=0.5)
    weights = {name: linear.weight.detach() for name, linear in linears.items()}
    for _ in range(20):
        criterion.observe(weights, {"a": 1e-3 * torch.randn(4, 8), "b": torch.zeros(4, 8)})
    found = criterion.scores(context_of(linears))
    # F of b is the common damping alone: half of the mean over both layers, which is half of that of a
    torch.testing.assert_close(found["b"], linears["b"].weight.detach() ** 2 * 0.25e-6 / 2, rtol=0.3, atol=0)
    assert found["a"].mean() > found["b"].mean()


@pytest.mark.parametrize("damp", [1e-4, 1e-3])
def test_a_small_damp_is_exact_too(damp):
    torch.manual_seed(7)
    linear, gradients = nn.Linear(32, 3), [torch.randn(3, 32) for _ in range(5)]  # so that F has not full rank
    found = shown(Fisher(block=32, damp=damp), linear, gradients)
    inverse = torch.linalg.inv(blocks_of(gradients, 1, 0, 32, damp)).diagonal()
    expected = linear.weight[1].detach().double() ** 2 / (2 * inverse)
    torch.testing.assert_close(found[1].double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_was_not_finite_is_told_with_its_layer(value):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    for linear in model:
        linear.weight.grad = torch.randn_like(linear.weight)
    model[1].weight.grad[2, 3] = value
    with pytest.raises(ValueError, match="scores of 1 hold NaN"):
        prune_(model, 0.5, "fisher")


def test_shards_of_rows_get_the_scores_of_the_whole(monkeypatch):
    torch.manual_seed(8)
    whole, scale = nn.Linear(8, 6), torch.tensor([1.0] * 4 + [0.1] * 2)[:, None]
    parts, gradients = {"top": nn.Linear(8, 4), "low": nn.Linear(8, 2)}, [torch.randn(6, 8) * scale for _ in range(9)]
    rows, told = {"top": slice(0, 4), "low": slice(4, 6)}, []
    for name, part in parts.items():  # each a process; the first time they only say what they have
        part.weight.data = whole.weight.detach()[rows[name]].clone()
        context = context_of({"a": part})
        context.sum_ = lambda tensor: told.append(tensor.clone())
        shown_to(Fisher(block=4), part, [g[rows[name]] for g in gradients], context)
    for name, part in parts.items():
        context = context_of({"a": part})
        context.sum_ = lambda tensor: tensor.copy_(sum(told))
        found = shown_to(Fisher(block=4), part, [g[rows[name]] for g in gradients], context)
        expected = shown(Fisher(block=4), whole, gradients)[rows[name]]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_what_it_saw_is_kept_to_the_bit():
    torch.manual_seed(4)
    linear, gradients = nn.Linear(9, 4), [torch.randn(4, 9) for _ in range(9)]
    whole, first, second = (Fisher(block=4, refresh=3) for _ in range(3))
    shown(first, linear, gradients[:5])
    second.load_state_dict(first.state_dict())
    for criterion, seen in ((whole, gradients[:5]), (whole, gradients[5:]), (second, gradients[5:])):
        found = shown(criterion, linear, seen)
    assert torch.equal(found, shown(whole, linear, []))
    with pytest.raises(ValueError, match=r"state of a has blocks of 4, expected 8; make the criterion with block=4"):
        Fisher(block=8).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"state of a expected \['fisher', 'inverse', 'steps'\], got \['moved'\]"):
        Fisher().load_state_dict({"a": {"moved": torch.zeros(4, 9)}})


@pytest.mark.parametrize(
    ("options", "why"),
    [({"block": 0}, "block expected"), ({"window": 2.5}, "window expected"), ({"refresh": True}, "refresh expected"),
     ({"damp": 1e-7}, "damp expected"), ({"damp": float("nan")}, "damp expected"), ({"blocks": 4}, "unknown option")],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(options, why):
    with pytest.raises(ValueError, match=why):
        make_criterion("fisher", options)


@pytest.mark.parametrize("granularity", ["element", sp.Block(4, 1), sp.NM(2, 4)], ids=str)
def test_it_prunes_by_the_gradients_it_saw(granularity):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="needs gradients"):
        prune_(model, 0.5, "fisher", granularity)
    criterion, data = Fisher(block=8, damp=1e-3), torch.randn(64, 16) * torch.tensor([10.0] * 8 + [0.01] * 8)
    for part in data.split(4):
        model.zero_grad()
        model(part).square().mean().backward()
        criterion.observe(
            {fqn: model[int(fqn)].weight.detach() for fqn in "02"}, {fqn: model[int(fqn)].weight.grad for fqn in "02"}
        )
    model.zero_grad()
    report = prune_(model, 0.5, criterion, granularity, scope="layer")
    assert report.density == 0.5
    kept = (model[0].weight != 0).sum(0)
    if granularity == "element":  # inputs that say nothing go first, whatever their weights
        assert kept[:8].sum() > 3 * kept[8:].sum()
