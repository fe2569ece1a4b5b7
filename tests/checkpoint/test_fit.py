"""What a checkpoint may be loaded into: meta models, wrapped ones, other dtypes; and where one may be saved."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn

import sparseprune as sp
from sparseprune.checkpoint import CheckpointError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.up, self.down = nn.Linear(32, 96), nn.Linear(96, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(5))

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))


IDS = torch.arange(40).view(4, 10)


def saved(path, layout="csr", **options) -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    sp.prune_(model, sparsity=0.9)
    if layout:
        sp.sparsify_(model, layout=layout, **options)
    sp.save(model, path)
    return model


def same(a, b):
    with torch.no_grad():
        return torch.equal(a(IDS), b(IDS))


def metadata(path) -> dict[str, str]:
    """The digest over everything that the file holds among it."""
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("layout", [None, "csr"])
def test_a_meta_model_gets_what_the_file_holds(tmp_path, layout):
    model = saved(tmp_path / "a", layout)
    with torch.device("meta"):
        empty = Net().eval()
    empty.up.weight.requires_grad_(False)
    sp.load(empty, tmp_path / "a")
    assert same(model, empty) and empty.head.weight is empty.embed.weight
    assert not any(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    assert isinstance(empty.embed.weight, nn.Parameter) and empty.embed.weight.requires_grad
    assert not (empty.up.values if layout else empty.up.weight).requires_grad
    again = sp.load(Net().eval().to("meta"), tmp_path / "a")
    assert same(model, again)
    assert same(model, sp.load(copy.deepcopy(model).to("meta"), tmp_path / "a"))


def test_what_would_stay_on_meta_is_named(tmp_path):
    saved(tmp_path / "a")
    with torch.device("meta"):
        model = Net()
        model.up.register_buffer("angles", torch.ones(3), persistent=False)
        model.table = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"table, up\.angles would stay on the meta device.*init_empty_weights"):
        sp.load(model, tmp_path / "a")
    assert model.up.weight.is_meta and type(model.up) is nn.Linear
    model.up.angles, model.table = torch.ones(3), torch.ones(3)
    sp.load(model, tmp_path / "a")


def test_transformers_under_init_empty_weights(tmp_path):
    transformers, accelerate = pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    config = transformers.Qwen3Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval()
    sp.prune_(model, sparsity=0.8)
    sp.sparsify_(model, layout="csr")
    sp.save(model, tmp_path / "a")
    with accelerate.init_empty_weights():
        empty = transformers.Qwen3ForCausalLM(config).eval()
    sp.load(empty, tmp_path / "a")
    assert empty.lm_head.weight is empty.get_input_embeddings().weight  # init_empty_weights had parted them
    with torch.no_grad():
        assert torch.equal(empty(IDS).logits, model(IDS).logits)
    with torch.device("meta"):
        empty = transformers.Qwen3ForCausalLM(config)
    with pytest.raises(CheckpointError, match=r"inv_freq.* would stay on the meta device"):
        sp.load(empty, tmp_path / "a")


def test_wrapped_models_are_the_models_inside(tmp_path):
    model = saved(tmp_path / "a")
    for wrapped in (torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))):
        sp.save(wrapped, tmp_path / "b")
        assert metadata(tmp_path / "b") == metadata(tmp_path / "a")
    for wrap in (torch.compile, nn.DataParallel):
        inside = Net().eval()
        wrapped = wrap(inside)
        assert sp.load(wrapped, tmp_path / "a") is wrapped and same(inside, model)


def test_parts_that_are_compiled_keep_their_names(tmp_path):
    def compiled():
        model = nn.Sequential(Net().eval(), nn.Linear(40, 40)).eval()
        model[0].up, model[1] = torch.compile(model[0].up), torch.compile(nn.Sequential(model[1]))
        return model

    plain = nn.Sequential(Net().eval(), nn.Sequential(nn.Linear(40, 40))).eval()
    sp.prune_(plain, sparsity=0.9)
    sp.save(plain, tmp_path / "a")
    model = compiled()
    parts = model[0].up, model[1]
    sp.load(model, tmp_path / "a")
    assert (model[0].up, model[1]) == parts and torch.equal(parts[1]._orig_mod[0].weight, plain[1][0].weight)
    sp.save(model, tmp_path / "b")
    assert metadata(tmp_path / "b") == metadata(tmp_path / "a")
    sp.sparsify_(plain, layout="csr")
    sp.save(plain, tmp_path / "a")
    assert same(sp.load(compiled(), tmp_path / "a")[0], plain[0])


def test_parts_under_activation_checkpointing_keep_their_names(tmp_path):
    """torch's wrapper is in the names of modules, and not in those of the state dict."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper

    def wrapped(model):
        model.up = torch.compile(checkpoint_wrapper(model.up), backend="eager")
        return checkpoint_wrapper(nn.Sequential(checkpoint_wrapper(model)))

    for layout in (None, "csr"):
        plain = nn.Sequential(saved(tmp_path / "other", layout))
        sp.save(plain, tmp_path / "a")
        sp.save(wrapped(copy.deepcopy(plain[0])), tmp_path / "b")
        assert metadata(tmp_path / "b") == metadata(tmp_path / "a")
        model = wrapped(Net().eval())
        sp.load(model, tmp_path / "a")
        assert isinstance(model._checkpoint_wrapped_module[0], CheckpointWrapper) and same(model, plain)


def test_a_model_under_distributed_data_parallel_is_saved_and_not_loaded_into(tmp_path):
    import torch.distributed as dist

    model = saved(tmp_path / "a", None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        sp.save(wrapped, tmp_path / "b")
        assert metadata(tmp_path / "b") == metadata(tmp_path / "a")
        with pytest.raises(CheckpointError, match="load first, then wrap"):
            sp.load(wrapped, tmp_path / "a")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("layout", [None, "csr"])
def test_values_take_the_dtype_of_the_model(tmp_path, layout):
    model = saved(tmp_path / "a", layout)
    for dtype in (torch.bfloat16, torch.float64):
        found = sp.load(Net().eval().to(dtype), tmp_path / "a")
        assert found.up.weight.dtype == dtype and torch.equal(found.up.weight, model.up.weight.to(dtype))
        assert found.steps.dtype == torch.int64


@pytest.mark.parametrize(
    "layout,options", [("csr", {}), ("bsr", {"blocksize": (1, 1)}), ("nm", {"nm": (4, 4)})], ids=["csr", "bsr", "nm"]
)
def test_a_sparse_model_takes_what_the_file_says(tmp_path, layout, options):
    target = saved(tmp_path / "other", layout, **options)
    model = saved(tmp_path / "a")
    assert same(sp.load(target, tmp_path / "a"), model) and target.up.layout == "csr"
    dense = saved(tmp_path / "a", None)
    assert same(sp.densify_(sp.load(target, tmp_path / "a")) and target, dense)


def test_frozen_layers_stay_frozen(tmp_path):
    saved(tmp_path / "a")
    target = Net()
    target.up.requires_grad_(False)
    sp.load(target, tmp_path / "a")
    assert not any(p.requires_grad for p in target.up.parameters())
    assert all(p.requires_grad for p in target.down.parameters())


def test_a_bare_sparse_layer_is_saved_and_loaded_into_a_linear(tmp_path):
    linear = nn.Linear(8, 8)
    sp.prune_(nn.Sequential(linear), 0.5)
    sp.save(sp.SparseLinear.from_linear(linear), tmp_path / "a")
    fresh = sp.load(nn.Linear(8, 8), tmp_path / "a")
    assert torch.equal(fresh.weight, linear.weight) and torch.equal(fresh.bias, linear.bias)
    with pytest.raises(CheckpointError, match=r"got a SparseLinear; load into an nn\.Linear"):
        sp.load(sp.SparseLinear.from_linear(nn.Linear(8, 8)), tmp_path / "a")


def test_odd_tensors_come_back(tmp_path):
    def make():
        model = nn.Module()
        for name, value in {
            "complex": torch.randn(3, dtype=torch.complex64), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4),
            "bits": torch.rand(0, 3) < 0.5, "flag": torch.tensor(True), "small": torch.ones(2, dtype=torch.uint8),
            "float8": torch.randn(4).to(torch.float8_e4m3fn), "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
            "spread": torch.randn(1, 3).expand(2, 3), "zeros": torch.zeros(50, 60), "ü::é": torch.ones(3, 3).triu(),
            "a": torch.randn(40, 40) * (torch.rand(40, 40) < 0.1), "a::index": torch.ones(2), "n" * 5000: torch.ones(1),
        }.items():  # fmt: skip
            model.register_buffer(name, value)
        model.empty = nn.Linear(0, 5)
        model.narrow = nn.Linear(5, 0)
        return model

    model = make()
    sp.save(model, tmp_path / "a")
    fresh = sp.load(make(), tmp_path / "a")
    for name, value in model.state_dict().items():
        got = fresh.state_dict()[name]
        assert got.dtype == value.dtype and torch.equal(got.to(torch.complex128), value.to(torch.complex128)), name
    sp.checkpoint.describe(tmp_path / "a")


class Counting(nn.Module):
    """With a state beside its tensors, and, ``doubled``, one that its state dict holds in another form."""

    def __init__(self, count: int, doubled: bool = False) -> None:
        super().__init__()
        self.count, self.shift = count, nn.Parameter(torch.full((3,), float(count)))
        if doubled:
            self._register_state_dict_hook(self._double)

    def _double(self, module, state, prefix, metadata):
        state[prefix + "shift"] = module.shift * 2

    def get_extra_state(self):
        return torch.tensor([self.count])

    def set_extra_state(self, state) -> None:
        self.count = int(state)


def test_a_state_beside_the_tensors_is_handed_back(tmp_path):
    def make(count):
        model = nn.Sequential(nn.Linear(16, 16), Counting(count))
        model.again = model[1]
        return model

    sp.save(make(7), tmp_path / "a")
    fresh = sp.load(make(2), tmp_path / "a")
    assert fresh[1].count == 7 and torch.equal(fresh[1].shift, torch.full((3,), 7.0))


def test_what_a_hook_of_the_state_dict_makes_is_not_written_to(tmp_path):
    sp.save(nn.Sequential(nn.Linear(16, 16), Counting(7, doubled=True)), tmp_path / "a")
    fresh = nn.Sequential(nn.Linear(16, 16), Counting(2, doubled=True))
    before = fresh[0].weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"1\.shift expected to be a parameter or a buffer.*load_state_dict"):
        sp.load(fresh, tmp_path / "a")
    assert torch.equal(fresh[0].weight, before) and fresh[1].count == 2


def test_a_layer_under_two_names_is_stored_once(tmp_path):
    def make():
        torch.manual_seed(0)
        model = Net()
        model.again = model.up
        return model.eval()

    model = make()
    sp.prune_(model, sparsity=0.9)
    sp.sparsify_(model, layout="csr")
    sp.save(model, tmp_path / "a")
    fresh = sp.load(make(), tmp_path / "a")
    assert fresh.again is fresh.up and same(fresh, model)
    report = sp.checkpoint.describe(tmp_path / "a")
    assert len({"up", "again"} & {layer.name for layer in report.layers}) == 1


class Untied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.embed.weight.detach().flip(0))
        self.again = nn.Linear(32, 96)

    def tie(self, what: str) -> Net:
        """As the file of one does not fit it."""
        if what == "weight":
            self.head.weight = self.embed.weight
        else:
            self.again = self.up
        return self


@pytest.mark.parametrize("keep", ["canonical", "packed"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("layout", [None, "csr"])
@pytest.mark.parametrize("what", ["weight", "layer"])
def test_two_values_do_not_go_into_one_tensor(tmp_path, what, layout, device, keep):
    torch.manual_seed(0)
    model = Untied().eval()
    sp.prune_(model, 0.9)
    if layout:
        sp.sparsify_(model, layout=layout, filter_fn=lambda module, fqn: fqn in ("up", "down"))
    sp.save(model, tmp_path / "a")
    with torch.device(device):
        target = Untied().eval().tie(what)
    before = {name: (id(value), value.clone()) for name, value in target.state_dict(keep_vars=True).items()}
    shared = r"embed\.weight and head\.weight" if what == "weight" else r"again\.(\w+) and up\.\1"
    with pytest.raises(CheckpointError, match=rf"one value for each tensor of Untied, got two for {shared}.*untie"):
        sp.load(target, tmp_path / "a", keep=keep)
    for name, value in target.state_dict(keep_vars=True).items():
        assert id(value) == before[name][0] and (value.is_meta or torch.equal(value, before[name][1])), name


def test_equal_values_may_go_into_one_tensor(tmp_path):
    """As a library writes that does not know ties; and a head that runs sparse shares nothing any more."""
    torch.manual_seed(0)
    model = Untied().eval()
    model.again.load_state_dict(model.up.state_dict())
    sp.prune_(model, 0.5, filter_fn=lambda module, fqn: fqn == "down")
    with torch.no_grad():
        model.head.weight.copy_(model.embed.weight)
    sp.save(model, tmp_path / "a")
    target = sp.load(Untied().eval().tie("weight").tie("layer"), tmp_path / "a")
    assert same(target, model) and target.again is target.up
    with torch.no_grad():
        model.head.weight.mul_(torch.rand(40, 32) < 0.1)
    model.head = sp.SparseLinear.from_linear(model.head)
    sp.save(model, tmp_path / "a")
    target = sp.load(Untied().eval().tie("weight").tie("layer"), tmp_path / "a")
    assert same(target, model) and type(target.head) is sp.SparseLinear


@pytest.mark.parametrize(
    "module,message",
    [
        (nn.LazyLinear(3), "run the model once"),
        (nn.Linear(3, 3, device="meta"), "strided tensor with memory"),
        (nn.Linear(3, 3).to(torch.complex128), "complex128"),
    ],
    ids=["lazy", "meta", "complex128"],
)
def test_what_no_file_can_hold_is_refused(tmp_path, module, message):
    with pytest.raises(CheckpointError, match=message):
        sp.save(nn.Sequential(module), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_name_of_the_format_itself_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'__metadata__' is the file format's own name; rename it"):
        sp.save(nn.ParameterDict({"__metadata__": torch.ones(2)}), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_lazy_model_is_run_before_it_is_filled(tmp_path):
    sp.save(nn.Sequential(nn.Linear(3, 3)), tmp_path / "a")
    with pytest.raises(CheckpointError, match="lazy"):
        sp.load(nn.Sequential(nn.LazyLinear(3)), tmp_path / "a")


def test_tensors_that_cannot_be_written_are_made_anew(tmp_path):
    model = saved(tmp_path / "a")
    with torch.inference_mode():
        target = Net().eval()
    target.steps = torch.zeros(1, dtype=torch.int64).expand(5)
    assert same(sp.load(target, tmp_path / "a"), model) and torch.equal(target.steps, model.steps)
    assert target.head.weight is target.embed.weight


def test_the_weights_of_another_library_are_not_replaced(tmp_path):
    model = saved(tmp_path / "a")
    for name, beside in (("model.safetensors", "config.json"), ("adapter_model.safetensors", "adapter_config.json")):
        (tmp_path / beside).write_text("{}")
        link = tmp_path / f"link to {name}"
        link.symlink_to(tmp_path / name)
        for path in (tmp_path / name, link):
            with pytest.raises(CheckpointError, match=f"{beside} beside it belongs to.*pruned.safetensors"):
                sp.save(model, path)
            with pytest.raises(CheckpointError, match="another library would load it"):
                sp.checkpoint.convert(tmp_path / "a", path)
        assert not (tmp_path / name).exists()
    sp.checkpoint.convert(tmp_path / "a", tmp_path / "model.safetensors", dense=True)
    sp.save(model, tmp_path / "pruned.safetensors")


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = saved("~/a")
    assert same(sp.load(Net().eval(), "~/a"), model) and (tmp_path / "a").exists()
    with pytest.raises(CheckpointError, match="home"):
        sp.load(Net(), "~nobody-at-all/a")


def test_saving_follows_links_and_refuses_devices(tmp_path):
    model = saved(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    sp.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "loop").symlink_to("loop")
    for path in ("/dev/null", tmp_path, tmp_path / "nowhere" / "a", "~nobody-at-all/a", tmp_path / "loop"):
        with pytest.raises(CheckpointError, match="could not be written"):
            sp.save(model, path)
    with pytest.raises(CheckpointError, match="null byte"):
        sp.save(model, "a\0b")
