"""Ternary layers against plain ones, and the rule that says which layers they replace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import model as tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ternq import rounding, ternary
from ternq.errors import InputError, RecipeError
from ternq.linear import (
    TernaryLinear,
    decoder_blocks,
    dense_weight,
    group_rule,
    packed_layers,
    prepare,
    select,
    ternary_layers,
)
from ternq.modeling_ternq import PackedLinear
from ternq.packing import pack_base3
from ternq.recipe import Scheme

SCHEMES = [
    Scheme(group_size=4),
    Scheme(group_size=4, shift=False),
    Scheme(group_size=7),  # 10 columns: 7 + 3
    Scheme(group_size=64),
]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(bias: bool = True) -> nn.Linear:
    """A layer of 10 inputs and 6 outputs."""
    torch.manual_seed(0)
    return nn.Linear(10, 6, bias=bias)


def packed(layer: TernaryLinear) -> PackedLinear:
    weight = layer.numbers().canonical()
    out_features, in_features = weight.codes.shape
    new = PackedLinear(
        in_features,
        out_features,
        bias=False,
        group_size=weight.group_size,
        shift=weight.shift is not None,
    )
    new.weight, new.bias = pack_base3(weight.codes), layer.bias
    new.weight_scale, new.weight_shift = weight.scale, weight.shift
    return new


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)


class Decoder(nn.Module):
    """What `select` looks at, without transformers."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


# --- a layer in training --------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_with_the_dequantized_weight(scheme: Scheme, bias: bool) -> None:
    layer = TernaryLinear.from_dense(dense(bias), scheme)
    codes = rounding.quantize(layer.weight, scheme.group_size)
    start = ternary.fit(layer.weight, codes, scheme.group_size, scheme.shift)
    weight = ternary.dequantize(codes, *start, scheme.group_size)
    x = gaussian(2, 3, 10)
    assert torch.equal(layer(x), F.linear(x, weight, layer.bias))
    assert torch.equal(layer.codes(), codes)


def test_the_parameters_are_those_of_the_dense_layer() -> None:
    plain = dense()
    layer = TernaryLinear.from_dense(plain, Scheme(group_size=4))
    assert layer.weight is plain.weight and layer.bias is plain.bias
    assert list(layer.state_dict()) == ["weight", "bias", "weight_scale", "weight_shift"]
    assert "weight_shift" not in dict(
        TernaryLinear.from_dense(dense(), Scheme(shift=False)).named_parameters()
    )


def test_every_parameter_learns() -> None:
    layer = TernaryLinear.from_dense(dense(), Scheme(group_size=4))
    layer(gaussian(5, 10)).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.any()


def test_a_conv1d_becomes_the_linear_layer_that_it_is() -> None:
    torch.manual_seed(0)
    conv = Conv1D(6, 10)
    conv.bias.data.normal_()
    assert torch.equal(dense_weight(conv), conv.weight.detach().t())
    layer = TernaryLinear.from_dense(conv, Scheme(group_size=4))
    assert (layer.in_features, layer.out_features) == (10, 6) and layer.bias is conv.bias
    x, before = gaussian(3, 10), conv.weight.detach().clone()
    twin = nn.Linear(10, 6)
    twin.weight.data, twin.bias.data = before.t().contiguous(), conv.bias.detach()
    assert torch.equal(layer(x), TernaryLinear.from_dense(twin, Scheme(group_size=4))(x))
    assert torch.equal(conv.weight, before)


def test_the_activations_keep_their_type() -> None:
    layer = TernaryLinear.from_dense(dense(), Scheme(group_size=4))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(gaussian(2, 10)).dtype == torch.bfloat16
    layer.bias = None
    assert layer(gaussian(2, 10).bfloat16()).dtype == torch.bfloat16


# --- packed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_layer_is_the_exported_one_to_the_bit(scheme: Scheme) -> None:
    layer = TernaryLinear.from_dense(dense(), scheme)
    with torch.no_grad():
        layer.weight_scale[::2] *= -1  # training may turn a scale; the stored form turns it back
    small = packed(layer)
    weight = layer.numbers().canonical()
    assert ternary.TernaryWeight(*small.unpacked(), scheme.group_size).same(weight)
    assert torch.equal(small.dequantized(), weight.dequantized())
    x = gaussian(4, 10)
    assert torch.equal(small(x), F.linear(x, small.dequantized(), layer.bias))
    torch.testing.assert_close(small(x), layer(x), rtol=1e-2, atol=1e-3)  # float16 scales


def test_a_layer_whose_scales_fit_float16_is_packed_without_loss() -> None:
    layer = TernaryLinear.from_dense(dense(), Scheme(group_size=4))
    for parameter in (layer.weight_scale, layer.weight_shift):
        assert parameter is not None
        parameter.data = parameter.data.half().float()
    x = gaussian(4, 10)
    assert torch.equal(packed(layer)(x), layer(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_goes_on_from_the_same_codes(scheme: Scheme) -> None:
    source = packed(TernaryLinear.from_dense(dense(), scheme))
    layer = TernaryLinear.from_packed(source, "ttq")
    assert layer.ste == "ttq" and layer.bias is source.bias
    assert torch.equal(layer.codes(), source.unpacked()[0])
    x = gaussian(4, 10)
    assert torch.equal(layer(x), source(x))
    again = packed(layer)
    assert torch.equal(again.weight, source.weight)
    assert torch.equal(again.weight_scale, source.weight_scale)


def test_a_packed_layer_takes_its_state_by_name() -> None:
    source = packed(TernaryLinear.from_dense(dense(), Scheme(group_size=4)))
    twin = PackedLinear(10, 6, bias=True, group_size=4, shift=True)
    twin.load_state_dict(source.state_dict())
    x = gaussian(4, 10)
    assert torch.equal(twin(x), source(x))
    assert source.weight.dtype == torch.uint8 and source.weight.shape == (6, 2)


# --- the rule -------------------------------------------------------------------------------------


def test_linear_layers_of_the_blocks_are_chosen_and_all_else_is_named() -> None:
    model = Decoder()
    selection = select(model, Scheme(group_size=4))
    assert list(selection.chosen) == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("up", "down")]
    reasons = {d.name: d.reason for d in selection.dense}
    assert reasons == {
        "embedding": "embedding",
        "head": "output head",
        "blocks.0.norm": "normalisation",
        "blocks.1.norm": "normalisation",
    }
    counted = sum(d.parameters for d in selection.dense)
    counted += sum(p.numel() for m in selection.chosen.values() for p in m.parameters())
    assert counted == sum(p.numel() for p in model.parameters())


def test_a_tied_embedding_is_named_once() -> None:
    model = Decoder()
    model.head.weight = model.embedding.weight
    named = {d.name: d for d in select(model, Scheme(group_size=4)).dense}
    assert named["embedding"].reason == "embedding, also the output head"
    assert named["embedding"].parameters == 160 and "head" not in named


@pytest.mark.parametrize(
    ("patterns", "skipped"),
    [
        (("down",), {"blocks.0.down", "blocks.1.down"}),
        (("blocks.1.*",), {"blocks.1.up", "blocks.1.down"}),
        (("blocks.0.up", "1.down"), {"blocks.0.up", "blocks.1.down"}),
    ],
)
def test_skip_names_layers_by_pattern(patterns: tuple[str, ...], skipped: set[str]) -> None:
    selection = select(Decoder(), Scheme(group_size=4, skip=patterns))
    assert {d.name for d in selection.dense if d.reason == "skipped by --skip"} == skipped
    assert not skipped & set(selection.chosen) and len(selection.chosen) == 4 - len(skipped)


@pytest.mark.parametrize("pattern", ["dwn", "head", "own"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(RecipeError, match=pattern) as caught:
        select(Decoder(), Scheme(group_size=4, skip=(pattern,)))
    assert "blocks.0.up" in (caught.value.hint or "")


def test_patterns_that_match_everything_are_refused() -> None:
    with pytest.raises(RecipeError, match="leaves no layer"):
        select(Decoder(), Scheme(group_size=4, skip=("*",)))


def test_a_group_is_no_wider_than_the_widest_row() -> None:
    select(Decoder(), Scheme(group_size=12))
    with pytest.raises(RecipeError, match="longest row"):
        select(Decoder(), Scheme(group_size=13))
    with pytest.raises(RecipeError, match="at least one column"):
        Scheme(group_size=0)


def test_fused_experts_are_refused_in_words() -> None:
    model = Decoder()
    model.blocks[0].experts = nn.Parameter(torch.zeros(4, 8, 8))
    with pytest.raises(InputError, match="fused into 3-D"):
        select(model, Scheme(group_size=4))


def test_a_model_without_blocks_or_without_linear_layers_is_refused() -> None:
    with pytest.raises(InputError, match="no list of decoder blocks"):
        decoder_blocks(nn.Linear(3, 3))
    model = Decoder()
    model.blocks = nn.ModuleList([nn.LayerNorm(8)])
    with pytest.raises(InputError, match="no linear layer"):
        select(model, Scheme(group_size=4))


def test_the_largest_list_holds_the_blocks() -> None:
    model = Decoder()
    model.adapters = nn.ModuleList([nn.Linear(2, 2)])
    model.blocks[1].experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    assert decoder_blocks(model)[0] == "blocks"


def test_prepare_swaps_what_select_chose_and_leaves_the_rest() -> None:
    model = tiny_model()
    before = copy.deepcopy(model)
    selection = prepare(model, Scheme(group_size=8), "ttq")
    layers = ternary_layers(model)
    assert set(layers) == set(selection.chosen) and len(layers) == 7
    assert not packed_layers(model)
    assert all(layer.ste == "ttq" and layer.group_size == 8 for layer in layers.values())
    for name, parameter in before.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


def test_uneven_rows_are_said() -> None:
    model = tiny_model()  # rows of 16 and 32
    assert group_rule(select(model, Scheme(group_size=8)), 8) is None
    said = group_rule(select(model, Scheme(group_size=12)), 12)
    assert said is not None and "16 = 1 x 12 + 4; 32 = 2 x 12 + 8" in said
