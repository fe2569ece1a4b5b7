"""Each side of an encoder-decoder has a mask of its own; attention across reads the states of the encoder."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseprune as sp
from sparseprune.pruning.batches import Batch
from sparseprune.pruning.positions import Positions, decoder_of
from sparseprune.pruning.reading import collect_inputs, input_norms


def model_of(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2,
            decoder_start_token_id=0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).eval()
    if kind == "bart":
        config = transformers.BartConfig(
            vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
        )  # fmt: skip
        return transformers.BartForConditionalGeneration(config).eval()
    sides = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    both = [transformers.BertConfig(**sides, intermediate_size=24) for _ in range(2)]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*both)
    return transformers.EncoderDecoderModel(config=config).eval()


def ids(length: int, real: list[int], seed: int) -> tuple[Tensor, Tensor]:
    found = torch.randint(3, 50, (len(real), length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) < torch.tensor(real)[:, None]).long()
    return found.masked_fill(mask == 0, 1), mask


def data(length: int, masked: bool) -> dict[str, Any]:
    """Three rows: nine real tokens for the encoder, and for the decoder six positions each, of which eight are real."""
    read, mask = ids(6, [2, 3, 4], 0)
    written, other = ids(6, [1, 6, 1], 1)
    grown = {"input_ids": nn.functional.pad(read, (0, length - 6), value=1)}
    grown |= {"attention_mask": nn.functional.pad(mask, (0, length - 6)), "decoder_input_ids": written}
    return {**grown, "decoder_attention_mask": other} if masked else grown


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [6, 8])
@pytest.mark.parametrize(
    ("kind", "cross"), [("t5", ("EncDecAttention", "kv")), ("bart", ("encoder_attn", "kv")), ("bert", ("cross", "kv"))]
)
def test_each_layer_reads_the_real_positions_of_its_own_input(
    kind: str, cross: tuple[str, str], length: int, masked: bool
) -> None:
    model = model_of(kind)
    linears = sp.nn.filters.prunable_linears(model)
    decoder = decoder_of(model)
    got = collect_inputs(model, linears, [data(length, masked)])
    norms = input_norms(model, linears, [Batch(data(length, masked))])
    seen = set()
    for name, x in got.items():
        if ".pooler" in name:
            continue
        states = cross[0] in name and name.split(".")[-1][0] in cross[1]
        side = "states" if states else "decoder" if name.startswith(f"{decoder}.") else "encoder"
        assert len(x) == (9 if side != "decoder" else 8 if masked else 18), name
        torch.testing.assert_close(norms[name], x.norm(dim=0), rtol=1e-4, atol=1e-5)
        seen.add(side)
    assert seen == {"encoder", "decoder", "states"}


@pytest.mark.parametrize("criterion", ["wanda", "admm"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_masks_do_not_hang_on_the_lengths_agreeing(kind: str, criterion: str) -> None:
    model = model_of(kind)
    found = [
        sp.prune_(
            copy.deepcopy(model), 0.5, criterion=criterion, data=[data(length, False)],
            criterion_options={"min_tokens": 1},
        ).masks
        for length in (6, 8)
    ]  # fmt: skip
    agree = sum(int((found[0][name] == found[1][name]).sum()) for name in found[0])
    assert agree >= 0.99 * sum(mask.numel() for mask in found[0].values())


def decoder_reads(model: nn.Module) -> list[Tensor]:
    """What the decoder is called with, from now on."""
    seen: list[Tensor] = []
    model.get_submodule(str(decoder_of(model))).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("form", ["batches", "batch", "pairs", "rows"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_decoder_reads_what_its_model_makes_of_the_labels(kind: str, form: str) -> None:
    """Labels themselves never reach the model; BART's forward, without them, would read the encoder's text twice."""
    model = model_of(kind)
    labels = torch.randint(3, 50, (3, 5), generator=torch.Generator().manual_seed(2))
    labels[1, 3:] = -100
    read, mask = ids(6, [2, 3, 4], 0)
    inputs = {"input_ids": read, "attention_mask": mask}
    batch = {**inputs, "labels": labels}
    rows = [{name: value[i].tolist() for name, value in batch.items()} for i in range(3)]
    given = {"batches": [batch], "batch": batch, "pairs": [(inputs, labels)], "rows": rows}[form]
    expected = model.prepare_decoder_input_ids_from_labels(labels=labels)
    seen = decoder_reads(model)
    collect_inputs(model, ["lm_head"], given)
    sp.prune_(model, 0.5, criterion="wanda", data=given, criterion_options={"min_tokens": 1})
    assert len(seen) > 1 and all(torch.equal(found, expected) for found in seen)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_padding_of_the_labels_does_not_count_in_the_decoder(kind: str) -> None:
    """Wanda's masks are those of the rows one by one, without padding; labels left out in the middle count."""
    model = model_of(kind)
    labels = torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(2))
    read = ids(6, [6, 6, 6], 0)[0]
    short = labels.clone()
    short[0, 2:], short[2, 5:] = -100, -100
    inside = labels.clone()
    inside[0, 2] = -100
    layer = f"{decoder_of(model)}.{'block.0.layer.2.DenseReluDense.wi' if kind == 't5' else 'layers.0.fc1'}"
    for given, rows in ((labels, 18), (short, 13), (inside, 18)):
        assert len(collect_inputs(model, [layer], [{"input_ids": read, "labels": given}])[layer]) == rows
    apart = [{"input_ids": read[i : i + 1], "labels": short[i : i + 1, :n]} for i, n in enumerate((2, 6, 5))]
    masks = [
        sp.prune_(
            copy.deepcopy(model), 0.5, criterion="wanda", data=data, criterion_options={"min_tokens": 1}
        ).masks
        for data in ([{"input_ids": read, "labels": short}], apart)
    ]  # fmt: skip
    agree = sum(int((masks[0][name] == masks[1][name]).sum()) for name in masks[0])
    assert agree >= 0.99 * sum(mask.numel() for mask in masks[0].values())


def test_labels_that_a_model_makes_nothing_of_are_not_dropped() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BlenderbotConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
    )  # fmt: skip
    model, read = transformers.BlenderbotForConditionalGeneration(config).eval(), ids(6, [6, 6, 6], 0)[0]
    said = "a batch for BlenderbotForConditionalGeneration expected a dict with decoder_input_ids"
    options = {"criterion": "wanda", "criterion_options": {"min_tokens": 1}}
    batch = {"input_ids": read, "labels": read}
    with pytest.raises(ValueError, match=f"{said}.*got input_ids"):
        sp.prune_(model, 0.5, data=[batch], **options)
    with pytest.raises(ValueError, match=f"{said}.*got input_ids"):
        collect_inputs(model, ["lm_head"], [batch])
    with pytest.raises(ValueError, match=r"expected a dict with decoder_input_ids.*got Tensor"):
        sp.prune_(model_of("bart"), 0.5, data=[(read, read + 1)], **options)
    assert sp.prune_(model, 0.5, data=[{**batch, "decoder_input_ids": read}], **options).kept


def test_a_block_of_the_decoder_gives_positions_of_the_decoder() -> None:
    model = model_of("t5")
    batch, bare = Batch(data(6, True)), Batch(data(6, False))
    hidden = torch.zeros(3, 6, 16)
    mask = Positions.of(batch, decoder_of(model)).of_module("decoder.block.0", hidden)
    assert mask is not None and torch.equal(mask, batch.kwargs["decoder_attention_mask"].bool())
    assert Positions.of(bare, decoder_of(model)).of_module("decoder.block.0", hidden) is None
    assert Positions.of(bare, decoder_of(model)).of_module("encoder.block.0", hidden) is bare.positions
    assert decoder_of(nn.Linear(2, 2)) is None
