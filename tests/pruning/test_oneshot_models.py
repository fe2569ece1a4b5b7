"""One-shot pruning of whole small models: structure, exact counts, the order of the walk, errors, resume, memory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparseprune as sp
from sparseprune.pruning import oneshot
from sparseprune.pruning.oneshot import ADMM, SparseGPT, admm, choosing, criteria, driver, reconstruct
from sparseprune.pruning.oneshot.calibration import calibration_batches
from sparseprune.pruning.oneshot.repeated import calibrating, capture, find_stacks, run_block
from sparseprune.pruning.oneshot.store import ChunkStore
from sparseprune.pruning.reading import collect_inputs

CRITERIA = ("wanda", "sparsegpt", "admm")
VOCABULARY = 97


def llama(layers: int = 3, **more: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, **more,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.BertForSequenceClassification(config).eval()


def tokens(rows: int = 8, length: int = 24, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    ("granularity", "sparsity"),
    [("element", 0.37), (sp.NM(2, 4), None), (sp.Block(4, 2), 0.6), (sp.Block(1, 4), 0.6)],
    ids=str,
)
def test_counts_are_exact_and_only_what_was_chosen_changes(criterion: str, granularity: Any, sparsity: Any) -> None:
    model = llama()
    before = snapshot(model)
    report = sp.prune_(model, sparsity, criterion=criterion, granularity=granularity, data=tokens())
    unit = granularity.r * granularity.c if isinstance(granularity, sp.Block) else 1
    units = report.total // unit
    assert report.kept == unit * (units - round((0.5 if sparsity is None else sparsity) * units))
    pruned = {f"{row.name}.weight" for row in report.layers}
    assert len(pruned) == 21 and not any("lm_head" in name or "embed" in name for name in pruned)
    for name, value in model.state_dict().items():
        if name in pruned:
            mask = report.masks[name.removesuffix(".weight")]
            assert bool((value[~mask] == 0).all())
        else:
            assert torch.equal(value, before[name]), name
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_wanda_keeps_the_same_count_in_every_row() -> None:
    model = llama()
    report = sp.prune_(model, 0.5, criterion="wanda", data=tokens())
    for mask in report.masks.values():
        assert set(mask.sum(1).tolist()) == {mask.shape[1] // 2}
    report = sp.prune_(llama(), 0.5, criterion="wanda", data=tokens(), criterion_options={"per_row": False})
    assert any(len(set(mask.sum(1).tolist())) > 1 for mask in report.masks.values())


def test_the_walk_follows_the_pruned_model() -> None:
    """Wanda on the second block must see what the pruned first block puts out, as a plain loop over the model does."""
    model, other = llama(2), llama(2)
    data = tokens()
    report = sp.prune_(model, 0.5, criterion="wanda", data=data)
    for block in other.model.layers:
        squares: dict[nn.Module, Tensor] = {}

        def see(module: nn.Module, args: tuple[Tensor], squares: dict[nn.Module, Tensor] = squares) -> None:
            squares[module] = args[0].flatten(0, -2).square().sum(0)

        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        hooks = [m.register_forward_pre_hook(see) for m in linears]
        with torch.no_grad():
            other(data)
            for hook in hooks:
                hook.remove()
            for m in linears:
                scores = m.weight.abs() * squares[m].sqrt()
                order = scores.argsort(dim=1, descending=True, stable=True)
                m.weight.scatter_(1, order[:, m.in_features // 2 :], 0.0)
    for fqn, mask in report.masks.items():
        assert torch.equal(mask, other.get_submodule(fqn).weight != 0), fqn


@pytest.mark.parametrize("spill", ["memory", "system", "folder"])
def test_chunks_and_spilling_change_nothing(tmp_path: Any, spill: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system, folder = tmp_path / "system", tmp_path / "new" / "folder"
    system.mkdir()
    expected = sp.prune_(llama(), 0.5, criterion="wanda", data=tokens(), criterion_options={"chunk_tokens": 10_000})
    monkeypatch.setattr(tempfile, "tempdir", str(system))  # only now: torch makes itself a folder at its first call
    stores: list[set[str]] = []

    def look(_: driver.Progress) -> None:
        stores.append({p.parent.name for p in tmp_path.rglob("*") if p.name.startswith("hidden.")})

    where = {"memory": False, "system": True, "folder": folder}[spill]
    options: dict[str, Any] = {"chunk_tokens": 48, "spill": where, "progress": look}
    got = sp.prune_(llama(), 0.5, criterion="wanda", data=tokens(), criterion_options=options)
    assert stores == [{"memory": set(), "system": {"system"}, "folder": {"folder"}}[spill]] * 3
    agree = sum(int((got.masks[f] == expected.masks[f]).sum()) for f in expected.masks)
    assert agree >= 0.999 * expected.total
    assert not list(system.iterdir()) and not (folder.exists() and list(folder.iterdir()))


def test_encoder_pads_do_not_count() -> None:
    ids = tokens(4, 20)
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    other = ids.clone()
    other[:, 12:] = 5
    reports = []
    for inputs in (ids, other):
        model = bert()
        batches = [{"input_ids": inputs, "attention_mask": mask, "labels": torch.zeros(4, dtype=torch.long)}]
        reports.append(sp.prune_(model, 0.5, criterion="sparsegpt", data=batches))
    assert reports[0].masks.mask_hash() == reports[1].masks.mask_hash()
    assert "classifier" in reports[0].skipped
    assert any("pooler" in row.name for row in reports[0].layers)


def test_pads_do_not_count_where_a_model_flattens_rows_and_positions() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    name = "model.decoder.layers.0.fc1"
    shapes: list[int] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: shapes.append(args[0].dim()))
    ids, mask = tokens(4, 12), torch.ones(4, 12, dtype=torch.long)
    mask[1:, 5:] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    got = collect_inputs(model, [name], [padded])[name]
    rows = [{"input_ids": part[m.bool()][None]} for part, m in zip(ids, mask)]
    torch.testing.assert_close(got, collect_inputs(model, [name], rows)[name])
    assert shapes[0] == 2 and len(got) == 27
    handle.remove()
    masks = [
        sp.prune_(copy.deepcopy(model), 0.5, criterion="wanda", data=data).masks for data in ([padded], rows)
    ]
    assert masks[0].mask_hash() == masks[1].mask_hash()


def test_sequential_and_a_model_without_blocks() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(12, 8), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) * self.right(x)

    torch.manual_seed(0)
    x = torch.randn(64, 12)
    for model in (nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8)), Fork()):
        for criterion in CRITERIA:
            report = sp.prune_(copy.deepcopy(model), 0.5, criterion=criterion, data=x)
            assert report.kept == report.total - round(0.5 * report.total)


def test_encoder_decoder_is_walked_stack_by_stack() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    data = [{"input_ids": tokens(4, 10, s), "decoder_input_ids": tokens(4, 7, s + 9)} for s in range(3)]
    seen: list[str] = []
    options = {"progress": lambda p: seen.append(p.block)}
    report = sp.prune_(model, 0.5, criterion="sparsegpt", data=data, criterion_options=options)
    assert seen == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    assert report.kept == report.total - round(0.5 * report.total)


@pytest.mark.parametrize("kind", ["llama", "bert", "mixed"])
def test_blocks_rerun_alone_give_the_models_own_outputs(kind: str, tmp_path: Any) -> None:
    """The captured arguments (masks, rotary embeddings, a layer's own kind of attention) suffice to rerun every
    block.
    """
    transformers = pytest.importorskip("transformers")
    if kind == "mixed":
        torch.manual_seed(0)
        config = transformers.Gemma3TextConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )  # fmt: skip
        model: nn.Module = transformers.Gemma3ForCausalLM(config).eval()
    else:
        model = llama() if kind == "llama" else bert()
    ids = tokens(6, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    data = [{"input_ids": part, "attention_mask": m} for part, m in zip(ids.split(2), mask.split(2))]
    linears = sp.nn.filters.prunable_linears(model)
    (stack,) = find_stacks(model, linears)
    outputs: list[Tensor] = []
    handle = stack.blocks[-1].register_forward_hook(
        lambda _m, _a, out: outputs.append(out if isinstance(out, Tensor) else out[0])
    )
    with torch.no_grad():
        for batch in data:
            model(**batch)
        handle.remove()
        with calibrating(model):
            captured = capture(model, stack, calibration_batches(data, model, 1), tmp_path)
            assert captured is not None
            for i, expected in enumerate(outputs):
                hidden = captured.hidden[i]
                for b, block in enumerate(stack.blocks):
                    hidden = run_block(block, hidden, captured.call(i), b)
                torch.testing.assert_close(hidden, expected)
    assert len(captured.calls) == 2  # the second and third batch have no pads and share their arguments
    captured.close()
    assert "forward" not in vars(stack.blocks[0])


def test_blocks_that_do_not_feed_each_other_are_taken_as_one_piece() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return sum(layer(x) for layer in self.layers)  # type: ignore[return-value]

    seen: list[str] = []
    options = {"progress": lambda p: seen.append(p.block)}
    report = sp.prune_(Skip(), 0.5, criterion="sparsegpt", data=torch.randn(32, 8), criterion_options=options)
    assert seen == [""] and report.kept == 96


BAD = {
    "missing": (None, "needs data"),
    "empty": (torch.zeros(0, 8, dtype=torch.long), "empty"),
    "no batches": ([], "empty"),
    "short": (tokens(1, 5), "too few"),
    "vocabulary": (tokens() + VOCABULARY, "vocabulary"),
    "negative": (tokens() - 5, "vocabulary"),
    "text": ("some text", "expected a list of texts, got one str"),
}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("case", BAD)
def test_wrong_calibration_is_refused_and_nothing_changes(criterion: str, case: str) -> None:
    data, words = BAD[case]
    model = llama(2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        sp.prune_(model, 0.5, criterion=criterion, data=data)
    assert unchanged(model, before)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_nan_in_a_late_block_puts_the_early_blocks_back(criterion: str, tmp_path: Any) -> None:
    model = llama(3)
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight[3] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.2\..*NaN"):
        sp.prune_(model, 0.5, criterion=criterion, data=tokens(), criterion_options={"spill": tmp_path})
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="NaN"):
        sp.prune_(nn.Linear(4, 4), 0.5, criterion=criterion, data=torch.full((8, 4), float("nan")))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_killed_run_resumes_to_the_same_masks(criterion: str, tmp_path: Any) -> None:
    whole = llama(3)
    expected = sp.prune_(whole, 0.6, criterion=criterion, data=tokens())
    for last in range(3):
        state = tmp_path / str(last)

        def kill(progress: driver.Progress, last: int = last) -> None:
            if progress.index == last:
                raise Killed

        model = llama(3)
        before = snapshot(model)
        with pytest.raises(Killed):
            options = {"state": state, "progress": kill}
            sp.prune_(model, 0.6, criterion=criterion, data=tokens(), criterion_options=options)
        assert unchanged(model, before)
        seen: list[driver.Progress] = []
        options = {"state": state, "progress": seen.append}
        report = sp.prune_(model, 0.6, criterion=criterion, data=tokens(), criterion_options=options)
        assert [p.resumed for p in seen] == [i <= last for i in range(3)]
        assert report.masks.mask_hash() == expected.masks.mask_hash()
        assert unchanged(model, snapshot(whole))
        assert not [p for p in state.iterdir() if p.suffix not in (".pt", ".json")]
    with pytest.raises(ValueError, match="another run"):
        sp.prune_(llama(3), 0.6, criterion=criterion, data=tokens(seed=5), criterion_options={"state": state})


def test_a_second_run_at_once_in_a_state_folder_is_refused(tmp_path: Any) -> None:
    """The first one goes on as if there were none, the second one's model stays as it was."""
    expected = sp.prune_(llama(), 0.6, criterion="wanda", data=tokens()).masks.mask_hash()
    refused = []

    def second(_: driver.Progress) -> None:
        model = llama()
        before = snapshot(model)
        said = rf"{tmp_path}: in use by process {os.getpid()} on .*; wait for it, or name another folder as state"
        with pytest.raises(BlockingIOError, match=said):
            sp.prune_(model, 0.6, criterion="wanda", data=tokens(), criterion_options={"state": tmp_path})
        refused.append(unchanged(model, before))

    options = {"state": tmp_path, "progress": second}
    report = sp.prune_(llama(), 0.6, criterion="wanda", data=tokens(), criterion_options=options)
    assert refused == [True] * 3 and report.masks.mask_hash() == expected
    again = sp.prune_(llama(), 0.6, criterion="wanda", data=tokens(), criterion_options={"state": str(tmp_path)})
    assert again.masks.mask_hash() == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(f"block_{i:05d}.pt" for i in range(3)), "run.json"]


@pytest.mark.parametrize("left", [0, 100])
def test_a_damaged_block_of_a_state_folder_is_named(left: int, tmp_path: Any) -> None:
    def options() -> dict[str, Any]:
        return {"criterion": "wanda", "data": tokens(), "criterion_options": {"state": tmp_path}}

    expected = sp.prune_(llama(), 0.6, **options()).masks.mask_hash()
    damaged = tmp_path / "block_00001.pt"
    damaged.write_bytes(damaged.read_bytes()[:left])
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{damaged}: not a readable finished block .*; delete it"):
        sp.prune_(model, 0.6, **options())
    assert unchanged(model, before)
    damaged.unlink()
    assert sp.prune_(model, 0.6, **options()).masks.mask_hash() == expected


def test_another_model_of_the_same_linears_is_another_run(tmp_path: Any) -> None:
    sp.prune_(llama(), 0.6, criterion="wanda", data=tokens(), criterion_options={"state": tmp_path})
    other = llama()
    with torch.no_grad():
        other.get_submodule("model.layers.0.input_layernorm").weight.fill_(3.0)
    before = snapshot(other)
    with pytest.raises(ValueError, match="belongs to another run, it differs in model"):
        sp.prune_(other, 0.6, criterion="wanda", data=tokens(), criterion_options={"state": tmp_path})
    assert unchanged(other, before)


def test_another_config_or_class_of_the_same_weights_is_another_run(tmp_path: Any) -> None:
    options = {"state": tmp_path}
    first = sp.prune_(llama(2), 0.6, criterion="wanda", data=tokens(), criterion_options=options)
    before = snapshot(llama(2))
    for more in ({"rms_norm_eps": 0.5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}):
        other = llama(2, **more)
        with pytest.raises(ValueError, match="belongs to another run, it differs in config"):
            sp.prune_(other, 0.6, criterion="wanda", data=tokens(), criterion_options=options)
        assert unchanged(other, before)
    other = llama(2)
    other.__class__ = type("Other", (type(other),), {})
    with pytest.raises(ValueError, match="belongs to another run, it differs in class"):
        sp.prune_(other, 0.6, criterion="wanda", data=tokens(), criterion_options=options)
    llama(2).save_pretrained(tmp_path / "saved")
    same = type(llama(2)).from_pretrained(tmp_path / "saved").eval()
    again = sp.prune_(same, 0.6, criterion="wanda", data=tokens(), criterion_options=options)
    assert again.masks.mask_hash() == first.masks.mask_hash()


def test_a_state_is_kept_of_models_and_batches_with_single_numbers(tmp_path: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.by = nn.Linear(8, 8), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.layer(x) * scale * self.by

    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(32, 8)
    for scale in (2.0, 3.0):
        data, folder = [{"x": x, "scale": torch.tensor(scale)}], tmp_path / str(scale)
        for _ in range(2):
            fresh = copy.deepcopy(model)
            sp.prune_(fresh, 0.5, criterion="wanda", data=data, criterion_options={"state": folder})
            assert int((fresh.layer.weight == 0).sum()) == 32
    with pytest.raises(ValueError, match="differs in data"):
        sp.prune_(model, 0.5, criterion="wanda", data=data, criterion_options={"state": tmp_path / "2.0"})


def test_a_process_killed_anywhere_goes_on_to_the_same_masks_and_weights(tmp_path: Any) -> None:
    script = Path(__file__).with_name("killed_oneshot.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(CRITERIA)
    resumed = []
    for runs in found.values():
        finished = ["run.json", *(f"block_{i:05d}.pt" for i in range(4))]
        for run in runs["killed"]:
            assert run["killed"] and "scratch" in run["left"] and run["after"] == sorted(finished)
            assert (run["hash"], run["weights"]) == (runs["whole"]["hash"], runs["whole"]["weights"])
            assert run["temporary"] == runs["whole"]["temporary"]  # nothing of the killed run among it
            resumed.append(run["resumed"])
        assert any(name.startswith(".block") for run in runs["killed"] for name in run["left"])  # a file half written
    assert set(resumed) <= {1, 2, 3} and len(set(resumed)) > 1


def test_scopes_allocations_and_densities_are_exact() -> None:
    total = None
    for options in ({}, {"allocation": "owl"}, {"allocation": "score"}):
        report = sp.prune_(llama(), 0.63, criterion="wanda", data=tokens(), criterion_options=options)
        total = report.total
        assert report.kept == total - round(0.63 * total)
    report = sp.prune_(llama(), 0.63, criterion="sparsegpt", data=tokens(), densities={"*layers.0.*": 2.0, "*": 1.0})
    assert report.kept == total - round(0.63 * report.total)
    first = [row.density for row in report.layers if ".0." in row.name]
    rest = [row.density for row in report.layers if ".0." not in row.name]
    assert min(first) > 1.9 * max(rest)
    report = sp.prune_(llama(), 0.63, criterion="sparsegpt", scope="layer", data=tokens())
    assert all(row.kept == row.total - round(0.63 * row.total) for row in report.layers)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="allocation"):
        criteria.Wanda(allocation="best")
    with pytest.raises(ValueError, match="damping"):
        criteria.SparseGPT(damping=0.0)
    with pytest.raises(ValueError, match="Heads"):
        sp.prune_(llama(), 0.5, criterion="sparsegpt", granularity=sp.Heads(), data=tokens())


@pytest.mark.parametrize("option", ["spill", "state"])
@pytest.mark.parametrize("kind", ["file", "number"])
def test_a_place_that_is_no_folder_is_refused(option: str, kind: str, tmp_path: Any) -> None:
    place = tmp_path / "file" if kind == "file" else 3
    (tmp_path / "file").touch()
    model = nn.Sequential(nn.Linear(8, 8))
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=f"{option} expected a folder.*got .*is made"):
        sp.prune_(model, 0.5, criterion="admm", data=torch.randn(64, 8), criterion_options={option: place})
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_hidden_states_are_spilled(tmp_path: Any, dtype: torch.dtype) -> None:
    store = ChunkStore(tmp_path / "new")
    values = torch.arange(12.0).view(2, 3, 2).transpose(0, 1).to(dtype)
    for value in (torch.ones(5, 1), {"a": values}, torch.zeros(0, 3)):
        store.append(value)
    store[0] = values
    other = store.copy(tmp_path)
    for each in (store, other):
        got = each[0]
        assert got.dtype == dtype and torch.equal(got, values)
        assert torch.equal(each[1]["a"], values) and each[2].shape == (0, 3)
        got.zero_()  # a caller's own copy
        assert torch.equal(each[0], values)
        with pytest.raises(IndexError):
            each[3]
    next(tmp_path.glob("hidden.*/0")).write_bytes(b"half")  # what a full disk leaves
    with pytest.raises(OSError, match=r"hidden states: expected \d+ bytes, got 4"):
        other[0]
    for each in (store, other):
        each.close()
    assert [p.name for p in tmp_path.iterdir()] == ["new"] and not list((tmp_path / "new").iterdir())


def test_an_error_while_hidden_states_are_collected_leaves_none(tmp_path: Any) -> None:
    model = llama(2)
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.get_input_embeddings().register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        sp.prune_(model, 0.5, criterion="wanda", data=tokens().split(2), criterion_options={"spill": tmp_path})
    handle.remove()
    assert not list(tmp_path.iterdir())


def test_an_error_while_the_teachers_states_are_copied_leaves_none(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = ChunkStore.append
    stores: list[ChunkStore] = []

    def append(self: ChunkStore, value: Any) -> None:
        if self not in stores:
            stores.append(self)
        if len(stores) == 3 and len(self) == 1:  # after those of the hidden states and of the calls
            raise OSError("disk full")
        full(self, value)

    monkeypatch.setattr(ChunkStore, "append", append)
    with pytest.raises(OSError, match="disk full"):
        sp.prune_(llama(2), 0.5, criterion="admm", data=tokens().split(2), criterion_options={"spill": tmp_path})
    assert not list(tmp_path.iterdir())


class Live(TorchDispatchMode):
    """The most bytes of storages made under it, and not mapped from elsewhere, that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and (s := each.untyped_storage())._cdata not in given:
                self.storages[s._cdata] = StorageWeakRef(s), s.nbytes()
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.parametrize(
    "criterion", [pytest.param(c, marks=pytest.mark.slow if c == "admm" else ()) for c in (*CRITERIA, "admm, epochs=0")]
)
def test_memory_is_less_than_a_block_above_a_chunk(
    criterion: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors that are alive at any time of a run, against those of reading one chunk: the difference is at most a
    block's parameters, whatever the number of blocks. Slices are to these layers as they are to a real model's.
    """
    monkeypatch.setattr(admm, "SLICE", 4096)
    monkeypatch.setattr(admm, "POLISHED", 2048)
    monkeypatch.setattr(admm, "TILE", 32)
    monkeypatch.setattr(reconstruct, "SLICE", 2048)
    monkeypatch.setattr(choosing, "SLICE", 1024)
    model = llama(4, hidden_size=64, intermediate_size=160)
    data = tokens(64, 24)
    with Live() as reading, torch.no_grad():
        model.model(data[:1], use_cache=False)
    peaks: list[int] = []
    live = Live()

    def progress(_: driver.Progress) -> None:
        peaks.append(live.peak)
        live.peak = 0

    options: dict[str, Any] = {"spill": tmp_path, "chunk_tokens": 24, "progress": progress}
    if "," in criterion:
        options["epochs"] = 0
    with live:
        sp.prune_(model, 0.5, criterion=criterion.split(",")[0], data=data, criterion_options=options)
    block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
    above = [peak - reading.peak for peak in peaks]
    assert max(above) <= (0.1 if criterion == "wanda" else 0.8) * block, [peak / block for peak in above]
    assert max(above[2:]) <= max(above[:2]) + 4096


def test_score_allocation_is_the_global_ranking_and_owl_follows_outliers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
    with torch.no_grad():
        model[1].weight[0] *= 50  # a sixteenth of the scores of this layer dwarfs the rest
    x = torch.randn(64, 16)
    linears = {str(i): model[i] for i in range(3)}
    inputs = [x, model[0](x), model[1](model[0](x))]
    scores = [(m.weight.abs() * i.square().mean(0).sqrt()).detach() for m, i in zip(model, inputs)]
    masks = sp.ops.topk_mask(scores, round(0.4 * 768))
    found = oneshot.score_densities(model, linears, x, 0.4)
    assert [round(found[str(i)] * 256) for i in range(3)] == [int(m.sum()) for m in masks]
    owl = oneshot.owl_densities(model, linears, x, 0.4, threshold=4.0, spread=0.1)
    assert owl["1"] == max(owl.values()) and max(owl.values()) - min(owl.values()) == pytest.approx(0.2)
    assert sum(owl.values()) / 3 == pytest.approx(0.4)


def test_every_argument_that_decides_the_result_is_compared_on_a_resume(tmp_path: Any) -> None:
    aside = {"chunk_tokens": 7, "min_tokens": 1, "state": tmp_path, "progress": print, "small_heap": True}
    options = ADMM(damping=0.5, polish=3, rate=0.1, allocation="owl", owl={"threshold": 4.0}, **aside).options()
    assert options == {
        "criterion": "admm", "per_row": False, "allocation": "owl", "owl": {"threshold": 4.0}, "damping": 0.5,
        "blocksize": 128, "polish": 3, "epochs": 1, "rate": 0.1,
    }  # fmt: skip

    class Decayed(SparseGPT):
        def __init__(self, *, decay: float = 0.5, **common: Any) -> None:
            super().__init__(**common)
            self.decay = decay

    class Hidden(Decayed):
        def __init__(self, *, power: float = 2.0, **common: Any) -> None:
            super().__init__(**common)
            self._power = power

    assert Decayed(decay=0.25).options()["decay"] == 0.25
    with pytest.raises(TypeError, match="'power' expected as an attribute of the same name"):
        Hidden().options()
