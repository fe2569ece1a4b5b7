from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparseprune.nn.filters import prunable_linears
from sparseprune.pruning import (
    NM,
    Block,
    Element,
    Heads,
    Mixture,
    Neurons,
    Plan,
    erk_densities,
    kept_count,
    make_granularity,
    weighted_counts,
)
from sparseprune.runner.text_encoder import TextEncoder


def small(hidden=16, ffn=24, layers=2, heads=4):
    torch.manual_seed(0)
    return TextEncoder(30, 3, hidden=hidden, ffn=ffn, layers=layers, heads=heads).eval()


def scores_of(layers):
    return {fqn: linear.weight.detach().abs() for fqn, linear in layers.items()}


def planned(model, granularity, scope="global", densities=None, floor=0.0):
    layers = prunable_linears(model)
    return Plan.build(model, layers, granularity, scope, densities, floor), scores_of(layers)


def count(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def test_the_worked_matrices():
    scores = torch.tensor([[3.0, 1.0], [2.0, 0.0]])
    assert Element().mask(scores, 2).tolist() == [[True, False], [True, False]]
    assert Block(2, 1).mask(scores, 1).tolist() == [[True, False], [True, False]]
    assert Block(1, 2).mask(scores, 1).tolist() == [[True, True], [False, False]]
    assert NM(2, 4).mask(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), 2).tolist() == [[True, False, True, False]]
    with pytest.raises(ValueError, match="k expected in"):
        Element().mask(scores, 5)
    with pytest.raises(ValueError, match="k is 2 here, got 3"):
        NM(2, 4).mask(torch.rand(1, 4), 3)
    with pytest.raises(ValueError, match=r"Heads\.mask"):
        Heads().mask(scores, 1)


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.37, 0.5, 0.9, 0.999, 1])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_elements_are_exact_and_the_largest_stay(sparsity, scope):
    model = nn.Sequential(nn.Linear(13, 7), nn.Linear(7, 11), nn.Linear(11, 1))
    plan, scores = planned(model, "element", scope)
    masks = plan.masks(scores, sparsity)
    sizes = {fqn: s.numel() for fqn, s in scores.items()}
    if scope == "layer":
        assert {f: int(m.sum()) for f, m in masks.items()} == {f: n - round(sparsity * n) for f, n in sizes.items()}
    else:
        total = sum(sizes.values())
        assert count(masks) == total - round(sparsity * total)
        kept = torch.cat([scores[f][masks[f]] for f in masks])
        gone = torch.cat([scores[f][~masks[f]] for f in masks])
        assert not len(kept) or not len(gone) or kept.min() >= gone.max()


def test_ties_go_to_the_earlier_layer_and_the_lower_index():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    plan, _ = planned(model, "element")
    masks = plan.masks({"0": torch.ones(2, 3), "1": torch.ones(2, 2)}, 0.3)
    assert masks["0"].all() and masks["1"].tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("r, c", [(4, 1), (1, 4), (8, 2), (16, 16)])
def test_blocks_are_whole_and_exact(r, c):
    plan, scores = planned(small(hidden=16, ffn=32), Block(r, c))
    masks = plan.masks(scores, 0.7)
    blocks = 0
    for mask in masks.values():
        rows, cols = mask.shape
        kept = mask.reshape(rows // r, r, cols // c, c).sum((1, 3))
        assert set(kept.flatten().tolist()) <= {0, r * c}
        blocks += int((kept > 0).sum())
    total = sum(s.numel() for s in scores.values()) // (r * c)
    assert blocks == total - round(0.7 * total)


def test_shapes_that_do_not_divide_say_what_to_do():
    model = nn.Sequential(nn.Linear(10, 6))
    with pytest.raises(ValueError, match=r"Block\(4, 1\): must divide the weight \[6, 10\] of '0'; choose divisors"):
        planned(model, Block(4, 1))
    with pytest.raises(ValueError, match=r"NM\(2, 4\): m must divide in_features, got 10 in '0'"):
        planned(model, NM(2, 4))
    for make in (lambda: Block(0, 1), lambda: Block(1, 1.5), lambda: NM(3, 2), lambda: NM(0, 2)):
        with pytest.raises(ValueError, match="expected"):
            make()


def test_nm_keeps_n_of_m_and_fixes_the_sparsity():
    plan, scores = planned(nn.Sequential(nn.Linear(12, 5)), NM(1, 4))
    masks = plan.masks(scores, plan.check_sparsity(None))
    assert (masks["0"].reshape(5, 3, 4).sum(-1) == 1).all()
    assert plan.check_sparsity(0.75) == 0.75
    with pytest.raises(ValueError, match=r"NM\(n=1, m=4\) fixes the sparsity at 0.75, got 0.5"):
        plan.check_sparsity(0.5)
    with pytest.raises(ValueError, match="the same everywhere"):
        planned(nn.Sequential(nn.Linear(12, 5)), NM(1, 4), densities={"*": 1.0})[0].masks(scores, 0.75)
    on_the_way = [int(plan.masks(scores, s)["0"][0, :4].sum()) for s in (0.0, 0.1, 0.25, 0.5, 0.6, 0.9)]
    assert on_the_way == [4, 4, 3, 2, 2, 1]


def test_heads_keep_whole_heads():
    model = small()
    plan, scores = planned(model, Heads())
    assert [m.key for m in plan.unit_maps] == ["layers.0:heads", "layers.1:heads"]
    assert plan.unit_maps[0].weights_per_unit == 4 * 4 * 16
    masks = plan.masks(scores, 0.5)
    heads = [masks[f"layers.{i}.query"][:, 0].reshape(4, 4) for i in range(2)]
    assert sum(int(h.all(1).sum()) for h in heads) == 4 and all((h.all(1) == h.any(1)).all() for h in heads)
    for i in range(2):
        assert torch.equal(masks[f"layers.{i}.query"], masks[f"layers.{i}.output"].T)
        assert torch.equal(masks[f"layers.{i}.query"], masks[f"layers.{i}.value"])
    assert all("no attention block" in why for why in plan.skipped.values()) and len(plan.skipped) == 4


def test_unit_scores_are_sums_and_choose_the_same_masks():
    for granularity in (Element(), Block(4, 1), Heads(), Neurons(), Mixture(Heads())):
        plan, scores = planned(small(), granularity)
        units = {m.key: m.reduce(scores) for m in plan.unit_maps}
        direct, through = plan.masks(scores, 0.6), plan.unit_masks(units, 0.6)
        assert all(torch.equal(direct[f], through[f]) for f in direct)
        for m in plan.unit_maps:
            whole = m.expand(torch.ones(m.shape, dtype=torch.bool))
            assert sum(int(mask.sum()) for mask in whole.values()) == m.units * m.weights_per_unit
            torch.testing.assert_close(units[m.key].sum(), sum(scores[f].sum() for f in m.layers))


def test_both_axes_keep_the_square_root_each():
    plan, scores = planned(small(hidden=16, ffn=64, layers=1), Neurons(per_axis=True))
    masks = plan.masks(scores, 0.75)
    up, down = (masks[f] for f in plan.layers)
    assert up.any(1).sum() == down.any(0).sum() == 32
    assert up.any(0).sum() == down.any(1).sum() == 8
    assert count(masks) * 4 == sum(s.numel() for s in scores.values() if 64 in s.shape)
    with pytest.raises(ValueError, match="per_axis and densities"):
        planned_with = Plan.build(small(), prunable_linears(small()), Neurons(per_axis=True), densities={"*": 1.0})
        planned_with.masks(scores_of(prunable_linears(small())), 0.5)


def test_a_mixture_is_exact_and_drops_whole_heads_first():
    model = small()
    plan, scores = planned(model, Mixture(Heads(), Element()))
    total = sum(s.numel() for s in scores.values())
    for sparsity in (0.3, 0.75, 0.9):
        masks = plan.masks(scores, sparsity)
        assert count(masks) == total - round(sparsity * total)
        alive = sum(int(masks[f"layers.{i}.query"].reshape(4, -1).any(1).sum()) for i in range(2))
        assert alive <= 8 - round((1 - math.sqrt(1 - sparsity)) * 8)
    with pytest.raises(ValueError, match="raise first_density"):
        planned(model, Mixture(Heads(), Element(), first_density=0.2), "layer")[0].masks(scores, 0.2)
    with pytest.raises(ValueError, match="Heads, Neurons or Block first"):
        Mixture(Element(), Element())
    for rescaled in (Heads(trim_rescale=True), make_granularity("neurons/axes")):  # nothing was rescaled
        with pytest.raises(ValueError, match="Mixture: first expected without trim_rescale, got"):
            Mixture(rescaled)


def test_patterns_choose_by_name():
    model = small(hidden=16, ffn=32)
    plan, scores = planned(model, {"*.query": Block(4, 4), "*.ffn.*": Neurons(), "layers.0.*": "element"}, "layer")
    kinds = {f: str(p.granularity) for p in plan.parts for f in p.layers}
    assert kinds["layers.1.query"] == "Block(r=4, c=4)" and kinds["layers.0.key"] == "Element()"
    assert plan.skipped["layers.1.key"] == "no granularity pattern fits its name"
    masks = plan.masks(scores, 0.5)
    assert all(abs(2 * int(m.sum()) - m.numel()) == 0 for m in masks.values())
    with pytest.raises(ValueError, match=r"pattern 'nowhere\*' fits no layer; the layers are: layers\.0\.query"):
        planned(model, {"nowhere*": "element"})
    with pytest.raises(ValueError, match="covers none of the layers"):
        planned(nn.Sequential(nn.Linear(4, 4)), Heads())


def test_part_of_a_block_is_left_out_with_a_reason():
    model = small()
    layers = {f: m for f, m in prunable_linears(model).items() if f != "layers.0.key"}
    plan = Plan.build(model, layers, Heads())
    assert plan.skipped["layers.0.query"] == "layers.0.key, of the same attention, is not selected"
    assert "layers.1.query" in plan.layers


def test_densities_are_relative_and_exact_in_total():
    model = nn.Sequential(nn.Linear(30, 10), nn.Linear(10, 20), nn.Linear(20, 7))
    plan, scores = planned(model, "element", densities={"0": 0.1, "1": 0.4, "*": 0.2})
    masks = plan.masks(scores, 0.8)
    assert count(masks) == 640 - round(0.8 * 640)
    assert int(masks["1"].sum()) / 200 == pytest.approx(4 * int(masks["0"].sum()) / 300, abs=0.02)
    with pytest.raises(ValueError, match=r"densities: no pattern fits 1, 2"):
        planned(model, "element", densities={"0": 0.1})
    assert set(erk_densities({"a": (4, 4), "b": (2, 8)})) == {"a", "b"}


@pytest.mark.parametrize(("granularity", "first"), [(Heads(), "*query"), (Neurons(), "*expand")])
def test_layers_that_share_units_have_one_density(granularity, first):
    """Each block went by the density of its first layer, whatever the others were given."""
    with pytest.raises(ValueError, match=r"densities: 'layers.0.* share the units of 'layers.0.*got 1 and 0.1; use"):
        planned(small(), granularity, densities={first: 1, "*": 0.1})
    plan, scores = planned(small(), granularity, densities={"layers.0.*": 1, "*": 0.5})
    masks = plan.masks(scores, 0.25)
    kept = [sum(int(m.sum()) for fqn, m in masks.items() if fqn.startswith(f"layers.{i}.")) for i in range(2)]
    assert kept[0] == 2 * kept[1] > 0  # all units of one block, half of the other's
    both = Mixture(granularity, Element())  # the first stage has its own density, the second goes by the layer
    plan, scores = planned(small(), both, densities={first: 1, "*": 0.5})
    assert count(plan.masks(scores, 0.9)) == round(0.1 * sum(s.numel() for s in scores.values()))


def starving(model, scale=1e-3):
    """The same model, with one layer whose weights are all smaller than those of the others."""
    with torch.no_grad():
        model.layers[0].output.weight.mul_(scale)
    return model


@pytest.mark.parametrize("granularity", ["element", Block(4, 2), Mixture(Block(4, 4)), Mixture(Heads(), Block(2, 2))])
def test_a_floor_feeds_the_starving_layer_and_keeps_the_total(granularity):
    plain, scores = planned(starving(small()), granularity)
    plan, _ = planned(starving(small()), granularity, floor=0.5)
    total = sum(s.numel() for s in scores.values())
    for sparsity in (0.0, 0.5, 0.8, 0.9):
        without, masks = plain.masks(scores, sparsity), plan.masks(scores, sparsity)
        assert count(masks) == count(without)
        least = (total - round(sparsity * total)) / total / 2
        held = [name for name, mask in masks.items() if int(mask.sum()) < math.floor(least * mask.numel() / 8) * 8]
        if not isinstance(granularity, Mixture):  # which may have dropped the layer's units before
            assert held == []
        if sparsity == 0.8:
            starved = "layers.0.output"
            assert int(without[starved].sum()) == 0
            assert isinstance(granularity, Mixture) or int(masks[starved].sum()) in (24, 25)  # of 256, at density 0.2


def test_a_floor_of_one_is_the_same_share_everywhere_and_one_of_zero_changes_nothing():
    (plan, scores), (layered, _) = planned(small(), "element", floor=1.0), planned(small(), "element", "layer")
    (none, _), (plain, _) = planned(small(), "element", floor=0.0), planned(small(), "element")
    for sparsity in (0.5, 0.75):
        shares = [plan.masks(scores, sparsity), layered.masks(scores, sparsity)]
        assert all(torch.equal(shares[0][f], shares[1][f]) for f in scores if f in shares[0])
        same = [none.masks(scores, sparsity), plain.masks(scores, sparsity)]
        assert all(torch.equal(same[0][f], same[1][f]) for f in same[0])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 4)), min_size=1, max_size=6), st.floats(0, 1), st.floats(0, 1)
)
def test_a_floor_is_exact_and_best_among_what_it_leaves_free(layers, sparsity, floor):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(n, 3, bias=False) for n, _ in layers))
    scores = {str(i): torch.rand(3, n, generator=generator) ** p for i, (n, p) in enumerate(layers)}
    masks = Plan.build(model, dict(model.named_children()), floor=floor).masks(scores, sparsity)
    total = sum(s.numel() for s in scores.values())
    kept = kept_count(total, sparsity)
    least = {f: math.floor(floor * kept * s.numel() / total) for f, s in scores.items()}
    assert count(masks) == kept and all(int(masks[f].sum()) >= least[f] for f in scores)
    above = [f for f in scores if int(masks[f].sum()) > least[f]]  # no swap with any of these would gain
    threshold = min((float(scores[f][masks[f]].min()) for f in above), default=0.0)
    for f in scores:
        if masks[f].any() and not masks[f].all():
            assert float(scores[f][masks[f]].min()) >= float(scores[f][~masks[f]].max())
        if not masks[f].all() and above:
            assert float(scores[f][~masks[f]].max()) <= threshold


def test_a_floor_is_refused_where_it_would_mean_nothing():
    for options in ({"scope": "layer"}, {"densities": {"*": 1.0}}):
        with pytest.raises(ValueError, match="floor: expected scope='global' and no densities"):
            planned(small(), "element", floor=0.5, **options)
    for floor in (-0.1, 1.1, "half", True):
        with pytest.raises(ValueError, match=r"floor: expected a share in \[0, 1\]"):
            planned(small(), "element", floor=floor)


def test_keys_are_unique_in_a_plan():
    plan, _ = planned(small(), Mixture(Block(4, 4), Block(2, 2)))
    keys = [m.key for m in plan.unit_maps]
    assert len(set(keys)) == len(keys) == 2 * len(plan.layers)

    class Twice(Element):
        def unit_maps(self, model, layers):
            maps, reasons = super().unit_maps(model, layers)
            return maps + maps, reasons

    with pytest.raises(ValueError, match=r"unique in a plan, got 'layers\.0\.query' twice"):
        planned(small(), Twice())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 500), st.floats(0.01, 10)), min_size=1, max_size=8), st.floats(0, 1))
def test_weighted_counts_always_reach_the_total(layers, sparsity):
    units, densities = [n for n, _ in layers], [d for _, d in layers]
    counts = weighted_counts(units, sparsity, densities)
    assert sum(counts) == kept_count(sum(units), sparsity)
    assert all(0 <= k <= n for k, n in zip(counts, units))


def test_weighted_counts_fill_and_refuse():
    assert weighted_counts([100, 100], 0.5, [1, 3]) == [25, 75]
    assert weighted_counts([10, 100], 0.5, [9, 1]) == [10, 45]
    assert weighted_counts([5, 5], 0.5, [0, 1]) == [0, 5]
    for densities in ([0, 1], [-1, 1], [math.nan, 1], [1]):
        with pytest.raises(ValueError, match="densities"):
            weighted_counts([5, 5], 0.3, densities)
    with pytest.raises(ValueError, match="sparsity expected"):
        kept_count(5, 1.5)


def test_bad_scores_name_their_layer():
    plan, scores = planned(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), "element")
    with pytest.raises(ValueError, match="scores of 1 hold NaN"):
        plan.masks({**scores, "1": torch.full((2, 3), math.nan)}, 0.5)
    with pytest.raises(ValueError, match=r"scores of 1 expected shape \[2, 3\], got \[3, 2\]"):
        plan.masks({**scores, "1": torch.ones(3, 2)}, 0.5)
    with pytest.raises(ValueError, match="scores of '1' are missing"):
        plan.masks({"0": scores["0"]}, 0.5)
    for spec in ("blocks", "16x", "x1", "2:4:8", "-1x4", 3, None):
        with pytest.raises(ValueError, match="granularity: expected one of"):
            make_granularity(spec)
    with pytest.raises(ValueError, match="scope: expected"):
        planned(nn.Sequential(nn.Linear(4, 3)), "element", "model")


def test_granularities_go_by_the_names_that_the_command_line_takes():
    assert make_granularity("16x1") == Block(16, 1) and make_granularity("2:4") == NM(2, 4)
    assert make_granularity("heads") == Heads() and make_granularity(Block(3, 2)) == Block(3, 2)
    with pytest.raises(ValueError, match=r"Block.*got"):
        make_granularity("0x4")


def test_infinite_scores_are_ranks_like_others():
    plan, _ = planned(nn.Sequential(nn.Linear(2, 2)), "element")
    masks = plan.masks({"0": torch.tensor([[math.inf, -math.inf], [0.0, 1.0]])}, 0.5)
    assert masks["0"].tolist() == [[True, False], [False, True]]


def test_plans_can_be_copied_and_pickled():
    for granularity in (Element(), Block(4, 1), NM(2, 4), Mixture(Heads(per_axis=False)), Neurons(per_axis=True)):
        plan, scores = planned(small(), granularity)
        sparsity = granularity.fixed_sparsity or 0.5
        masks = plan.masks(scores, sparsity)
        for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
            again = twin.masks(scores, sparsity)
            assert all(torch.equal(masks[f], again[f]) for f in masks)
