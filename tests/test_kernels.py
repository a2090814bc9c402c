"""Products with packed weights: every kernel against float64, and what a layer does with them."""

import copy
import io
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ISAS, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ternq import kernels, rounding, ternary
from ternq.errors import RecipeError
from ternq.kernels import PackedWeight, native
from ternq.kernels import build as builder
from ternq.modeling_ternq import DenseHead, Int8Linear, PackedLinear, is_linear
from ternq.packing import pack_base3

ERROR = {"exact": 1e-4, "int8": 2e-2}  # root mean square, of normal activations, relative


@pytest.fixture(autouse=True)
def installed(lib: native.Native, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: (lib, ""))
    monkeypatch.delenv("TERNQ_KERNEL", raising=False)


def weight(
    rows: int, columns: int, group_size: int = 128, shifted: bool = True, seed: int = 0
) -> PackedWeight:
    """Random codes, scales between 0.1 and 1.1, shifts about 0.1."""
    draw = torch.Generator().manual_seed(seed)
    groups = (rows, -(-columns // group_size))
    codes = torch.randint(-1, 2, (rows, columns), generator=draw, dtype=torch.int8)
    scale = (torch.rand(groups, generator=draw) + 0.1).half()
    shift = (torch.randn(groups, generator=draw) * 0.1).half() if shifted else None
    return PackedWeight.of(pack_base3(codes), scale, shift, columns, group_size)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, relative."""
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def product(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """In float64."""
    wide = None if bias is None else bias.double()
    return F.linear(x.double(), packed.dequantized().double(), wide)


# --- the product ----------------------------------------------------------------------------------

SHAPES = [
    (576, 576, 128),  # 4 x 128 + 64
    (33, 100, 7),
    (5, 3, 8),
    (40, 300, 64),
    (17, 513, 192),
    (64, 1000, 1000),  # one group a row
    (200, 320, 96),
]


@pytest.mark.parametrize("act", ["exact", "int8"])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_that_of_the_numbers(
    lib: native.Native, isa: str, shape: tuple[int, int, int], shifted: bool, act: Any
) -> None:
    packed = weight(*shape, shifted)
    form = lib.convert(packed)
    for tokens in (1, 2, 3, 17, 130):
        x, bias = normal(tokens, shape[1]), normal(shape[0])
        assert error(lib.matmul(x, form, bias, act), product(x, packed, bias)) < ERROR[act]


@pytest.mark.parametrize("tokens", [1, 6, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_takes_and_gives_every_type(isa: str, dtype: torch.dtype, tokens: int) -> None:
    packed = weight(96, 320)
    form = kernels.convert(packed)
    x, bias = normal(2, tokens, 320).to(dtype), normal(96).to(dtype)
    found = kernels.ternary_matmul(x, form, bias=bias)
    assert found.dtype == dtype and found.shape == (2, tokens, 96)
    rounding = 2e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert error(found, product(x, packed, bias)) < rounding


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 400),
    group=st.integers(1, 300),
    tokens=st.integers(1, 20),
    shifted=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(
    lib: native.Native,
    rows: int,
    columns: int,
    group: int,
    tokens: int,
    shifted: bool,
    seed: int,
) -> None:
    packed = weight(rows, columns, group, shifted, seed)
    form = lib.convert(packed)
    back = lib.restore(form)
    for name in ("codes", "scale", "shift"):
        ours, theirs = getattr(back, name), getattr(packed, name)
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert torch.equal(lib.dense(form), packed.dequantized())
    x = normal(tokens, columns, seed=seed)
    most = packed.dequantized().double().abs().sum(1) * float(x.abs().max())
    wanted = product(x, packed)
    for name in ISAS:
        if lib.use_isa(name):
            difference = (lib.matmul(x, form).double() - wanted).abs()
            assert bool((difference <= 2e-5 * most + 1e-6).all()), name
    lib.use_isa(None)


def test_a_token_does_not_depend_on_its_company(lib: native.Native, isa: str) -> None:
    form, x = lib.convert(weight(48, 300)), normal(45, 300)
    together = lib.matmul(x, form)
    for token in range(45):
        assert torch.equal(lib.matmul(x[token], form), together[token])


@pytest.mark.parametrize("spread", ["normal", "heavy", "outliers"])
def test_exact_is_closer_than_float16_activations(
    lib: native.Native, isa: str, spread: str
) -> None:
    packed, x = weight(64, 1024), normal(32, 1024)
    if spread == "heavy":
        x = x / normal(32, 1024, seed=2).abs().clamp_min(0.05)
    if spread == "outliers":
        x[:, ::128] *= 50
    wanted = product(x, packed)
    assert error(lib.matmul(x, lib.convert(packed)), wanted) < error(
        product(x.half(), packed), wanted
    )


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e20, 1e34])
def test_any_size_of_activations(lib: native.Native, isa: str, scale: float) -> None:
    packed, x = weight(32, 256), normal(3, 256) * scale
    found = lib.matmul(x, lib.convert(packed)).double()
    assert float((found - product(x, packed)).norm()) <= 1e-4 * scale * 3 * 256 + 1e-28


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("act", ["exact", "int8"])
def test_what_is_not_finite_goes_through_as_in_a_dense_product(
    lib: native.Native, isa: str, value: float, act: Any
) -> None:
    packed = weight(40, 200, shifted=False)  # weights of 0 too: infinity times 0 is NaN
    x = normal(5, 200)
    x[1, 7] = value
    found, wanted = lib.matmul(x, lib.convert(packed), act=act), product(x, packed).float()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[1][found[1].isinf()], wanted[1][wanted[1].isinf()])
    assert found[[0, 2, 3, 4]].isfinite().all()


def test_the_largest_activations(lib: native.Native, isa: str) -> None:
    """Finite where a dense product is: sums of so large steps would not be."""
    packed = weight(40, 200)
    for x in (torch.full((1, 200), 1e36), normal(3, 200) * 1e36):
        found, wanted = lib.matmul(x, lib.convert(packed)), product(x, packed)
        assert found.isfinite().all() and error(found, wanted) < 1e-5


def test_what_does_not_fit_is_refused(lib: native.Native) -> None:
    packed, x = weight(200, 256), normal(6, 256)
    scale, shift = packed.scale, packed.shift
    assert scale is not None and shift is not None
    for form in (lib.convert(packed), packed):
        for bias in (torch.ones(3), torch.ones(1), torch.ones(6, 200), torch.ones(201)):
            with pytest.raises((ValueError, RuntimeError)):
                kernels.ternary_matmul(x, form, bias=bias)
        for wrong in (x.to("meta"), x.long(), torch.tensor(1.0), x[:, :5]):
            with pytest.raises((ValueError, RuntimeError)):
                kernels.ternary_matmul(wrong, form)
        other: Any = "int4"
        with pytest.raises(ValueError, match="int4"):
            kernels.ternary_matmul(x, form, other)
    for factor in (scale.float(), scale.bfloat16(), scale[:, :1], scale[:5]):
        with pytest.raises(ValueError, match="scale or shift"):
            PackedWeight.of(packed.codes, factor, shift, 256, 128)
    with pytest.raises(ValueError, match="codes"):
        PackedWeight.of(packed.codes[:, 1:], scale, shift, 256, 128)


def test_odd_tensors(lib: native.Native) -> None:
    packed = weight(48, 256)
    form, x = lib.convert(packed), normal(6, 256)
    wanted = lib.matmul(x, form)
    wide = torch.zeros(6, 512)
    wide[:, ::2] = x
    assert torch.equal(lib.matmul(wide[:, ::2], form), wanted)
    assert torch.equal(lib.matmul(x.t().contiguous().t(), form), wanted)
    apart = torch.zeros(6 * 256 * 4 + 1, dtype=torch.uint8)
    off = torch.frombuffer(memoryview(apart.numpy())[1:], dtype=torch.float32).view(6, 256)
    assert off.copy_(x).data_ptr() % 4 and torch.equal(lib.matmul(off, form), wanted)
    assert torch.equal(lib.matmul(torch._neg_view(x), form), lib.matmul(-x, form))
    assert lib.matmul(x[:0], form).shape == (0, 48)
    assert lib.matmul(x.view(2, 3, 256)[:, :0], form).shape == (2, 0, 48)
    with pytest.raises(ValueError, match="columns"):
        lib.matmul(x[:, :5], form)


@pytest.mark.parametrize("threads", [2, 33])
def test_the_number_of_threads_changes_nothing(lib: native.Native, threads: int) -> None:
    form, x = lib.convert(weight(512, 512)), normal(70, 512)
    wanted, before = lib.matmul(x, form), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(lib.matmul(x, form), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sizes", [(2**31, 16, 16), (16, 2**31, 16), (16, 0, 1), (16, 16, 0)])
def test_sizes_out_of_bounds_are_refused(lib: native.Native, sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="rows"):
        lib.size(*sizes, True)


def test_large_matrices_are_counted_in_64_bits(lib: native.Native) -> None:
    assert lib.size(2**20, 2**20, 128, True) == 2**40 // 4 + 2**40 // 128 * 4


@pytest.mark.slow
@pytest.mark.parametrize("act", ["exact", "int8"])
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"),
    [(38_000, 57_600, 2), (16, 32_768, 65_600), (65_600, 128, 32_800)],
    ids=["weights", "activations", "outputs"],
)
def test_more_than_2_31_elements(
    lib: native.Native, rows: int, columns: int, tokens: int, act: Any
) -> None:
    """Memory: up to 10 GB. Looked at are both ends, and the place of element 2^31."""
    codes = torch.randint(0, 243, (1000, -(-columns // 5)), dtype=torch.uint8)
    codes = codes.repeat(-(-rows // 1000), 1)[:rows].roll(7, 1)
    if columns % 5:
        codes[:, -1] = 121  # five codes 0, of which the last stand beyond the columns
    scale = torch.rand(rows, columns // 128).half()
    packed = PackedWeight.of(codes, scale, -scale / 4, columns, 128)
    x = torch.randn(min(tokens, 100), columns).bfloat16().repeat(-(-tokens // 100), 1)[:tokens]
    assert max(rows * columns, x.numel(), tokens * rows) > 2**31
    found = lib.matmul(x, lib.convert(packed), None, act)

    def around(count: int, width: int) -> Tensor:
        """Both ends, and the lines around element 2^31 where there is one."""
        middle = min(2**31 // width, count - 1)
        lines = {n for at in (0, middle, count - 1) for n in range(at - 8, at + 8)}
        return torch.tensor(sorted(n for n in lines if 0 <= n < count))

    r, t = around(rows, columns), around(tokens, max(rows, columns))
    some = PackedWeight.of(codes[r], scale[r], -scale[r] / 4, columns, 128)
    assert error(found[t][:, r], product(x[t], some)) < max(ERROR[act], 4e-3)  # of bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_by_the_dense_product(
    lib: native.Native, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that is faster, as with AMX; also in parts."""
    packed, x, bias = weight(100, 256), normal(2, 40, 256).to(dtype), normal(100)
    form = lib.convert(packed)
    monkeypatch.setattr(native, "_dense_is_faster", lambda *_: True)
    wanted = F.linear(x, packed.dequantized().to(dtype), bias.to(dtype))
    torch.testing.assert_close(lib.matmul(x, form, bias), wanted)
    monkeypatch.setattr(native, "_DENSE_WEIGHTS", 48 * 256)
    torch.testing.assert_close(lib.matmul(x, form, bias), wanted, rtol=2e-2, atol=0.2)


# --- the layer ------------------------------------------------------------------------------------


def layer(rows: int = 192, columns: int = 320, bias: bool = True) -> PackedLinear:
    packed = weight(rows, columns)
    new = PackedLinear(columns, rows, bias=bias, group_size=128, shift=True)
    assert packed.scale is not None
    new.weight, new.weight_scale, new.weight_shift = packed.codes, packed.scale, packed.shift
    if new.bias is not None:
        new.bias.data = normal(rows)
    return new.requires_grad_(False)


def test_a_layer_gives_up_what_it_was_loaded_from_and_makes_it_again() -> None:
    module = layer()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    numbers, x = module.dequantized(), normal(3, 320)
    file = sum(buffer.nbytes for buffer in module.buffers())
    module(x)
    assert "weight" not in dict(module.named_buffers()) and module.words.dtype == torch.uint8
    assert sum(buffer.nbytes for buffer in module.buffers()) <= 1.25 * file
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert torch.equal(module.weight, before["weight"])
    assert torch.equal(module.dequantized(), numbers)
    module.weight_scale = module.weight_scale * 2
    assert torch.equal(module.weight, before["weight"])
    assert torch.equal(module.weight_scale, before["weight_scale"] * 2)


def test_a_layer_in_use_is_copied_pickled_cast_and_loaded() -> None:
    module, x = layer(), normal(3, 320)
    wanted, scale = module(x), module.weight_scale
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert other.words.data_ptr() != module.words.data_ptr()
        assert torch.equal(other(x), wanted)
        assert torch.equal(other.half().weight_scale, scale)
        assert other(x.half()).dtype == torch.float16
    other = layer()
    other.weight_scale = scale * 0
    other(x)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), wanted)
    assert other.to("meta").weight.device.type == "meta"


def test_gradients_go_to_the_input_and_the_bias() -> None:
    module, x = layer(), normal(3, 320).requires_grad_()
    with torch.no_grad():
        module(x)
    module.bias.requires_grad_(True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.dequantized().sum(0).expand(3, -1))
    assert torch.equal(module.bias.grad, torch.full((192,), 3.0))


def test_autocast_and_activations_of_8_bits() -> None:
    module, x = layer(), normal(3, 320)
    wanted = product(x, weight(192, 320), module.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        assert module(x.double()).dtype == torch.float64  # as in a dense layer
        for form in (module._form, weight(192, 320)):
            assert kernels.ternary_matmul(x, form).dtype == x.dtype
    assert error(module(x), wanted) < ERROR["exact"]
    module.act = "int8"
    assert ERROR["exact"] < error(module(x), wanted) < ERROR["int8"]


def test_a_layer_is_compiled_whole() -> None:
    module, x = layer(), normal(3, 320)
    wanted = module(x)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), wanted)
    form = module._form
    arguments = (x, form.codes, module.bias, 192, 320, 128, True, "exact")
    torch.library.opcheck(torch.ops.ternq.matmul.default, arguments)
    torch.library.opcheck(torch.ops.ternq.dense.default, (form.codes, 192, 320, 128, True))
    learning = x.clone().requires_grad_()
    compiled(learning).sum().backward()  # by the numbers, which are an operator too
    assert learning.grad is not None
    torch.testing.assert_close(learning.grad, module.dequantized().sum(0).expand(3, -1))


def test_small_layers_and_odd_groups_stay_as_they_are() -> None:
    assert not kernels.fast(weight(64, 64))
    assert not kernels.fast(weight(256, 256, group_size=8))
    assert kernels.fast(weight(256, 256, group_size=64)) and kernels.fast(weight(256, 250, 250))


def packed_model() -> Any:
    """A small Llama whose linear layers are packed, and large enough for kernels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model: Any = LlamaForCausalLM(config).eval()
    for name, module in list(model.model.layers.named_modules()):
        if is_linear(module):
            codes = rounding.quantize(module.weight, 128)
            scale, shift = ternary.fit(module.weight, codes, 128, True)
            new = PackedLinear(
                module.in_features, module.out_features, bias=False, group_size=128, shift=True
            )
            codes, new.weight_scale, new.weight_shift = ternary.canonical(codes, scale, shift, 128)
            new.weight = pack_base3(codes)
            model.model.layers.set_submodule(name, new)
    return model


def test_a_model_generates_the_same() -> None:
    model = packed_model()
    ids = torch.arange(6).view(1, 6)
    texts = []
    for kernel in ("torch", "native"):
        with kernels.using(kernel):
            texts.append(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)
    assert any(hasattr(module, "words") for module in model.modules())


# --- the choice, and the compiler -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*native.DTYPES, torch.int8])
@pytest.mark.parametrize("columns", [96, 77])
def test_a_head_times_a_few_tokens(
    lib: native.Native, isa: str, dtype: torch.dtype, columns: int
) -> None:
    exact = normal(301, columns, seed=2).double()
    scale = None
    if dtype == torch.int8:
        scale = (normal(301, seed=3).abs() / 100 + 0.01).half()
        table = (exact * 40).clamp(-127, 127).round().to(dtype)
        exact = table.double() * scale.double().unsqueeze(1)
    else:
        table = exact.to(dtype)
        exact = table.double()
    for tokens in (1, 2, 16):
        x = normal(1, tokens, columns, seed=tokens)
        found = lib.table_product(x, table, scale)
        assert found.shape == (1, tokens, 301) and found.dtype == torch.float32
        assert error(found, x.double() @ exact.T) < 1e-6
        assert torch.equal(found[:, :1], lib.table_product(x[:, :1], table, scale))
    half = lib.table_product(x.bfloat16(), table, scale)
    assert half.dtype == torch.bfloat16
    assert error(half, x.bfloat16().double() @ exact.T) < 4e-3
    assert lib.table_product(x[:, :0], table, scale).shape == (1, 0, 301)
    assert lib.table_product(x, table[:0], scale).shape == (1, 16, 0)


def test_when_a_head_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    table, x = normal(40, 32), normal(1, 32)
    assert kernels.table_product(x, table) is not None
    assert kernels.table_product(normal(kernels.FEW + 1, 32), table) is None
    assert kernels.table_product(x[:0], table) is None
    assert kernels.table_product(x.double(), table) is None
    assert kernels.table_product(normal(1, 16), table) is None  # torch says that it does not fit
    with pytest.raises(ValueError, match="columns"):
        torch.ops.ternq.table(normal(1, 64), table, None)
    table.requires_grad_()
    assert kernels.table_product(x, table) is None
    with torch.no_grad():
        assert kernels.table_product(x, table) is not None
        with torch.autocast("cpu"):
            assert kernels.table_product(x, table) is None
        with kernels.using("torch"):
            assert kernels.table_product(x, table) is None


@torch.no_grad()
def test_heads_of_packed_models_use_it() -> None:
    head = nn.Linear(64, 300)
    head.__class__ = DenseHead
    x = normal(2, 1, 64)
    eight = Int8Linear(64, 300)
    eight.weight.data = torch.randint(-127, 128, (300, 64), dtype=torch.int8)
    eight.weight_scale = (normal(300).abs() / 50 + 0.01).half()
    for layer in (head, eight):
        assert isinstance(layer, DenseHead | Int8Linear)
        found = layer(x)
        with kernels.using("torch"):
            assert error(found, layer(x)) < 1e-6
        assert error(layer(x.expand(2, 20, 64))[:, 3:4], found) < 1e-6


@torch.no_grad()
def test_a_packed_model_is_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # to look for the library must not break the graph either
    if native.load()[0] is None:
        pytest.skip("the kernels are not compiled here")
    model = packed_model()
    model.lm_head.__class__ = DenseHead
    ids = torch.arange(5).view(1, 5)
    wanted = model(ids, use_cache=False, logits_to_keep=1).logits
    model.to("cpu")
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert layers and all(hasattr(layer, "words") for layer in layers)
    graphs: list[str] = []

    def kept(graph: Any, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(model, backend=kept, fullgraph=True)
    found = compiled(ids, use_cache=False, logits_to_keep=1).logits
    assert torch.equal(found, wanted)
    assert len(graphs) == 1
    assert graphs[0].count("ternq.matmul") == len(layers) and "ternq.table" in graphs[0]


def test_the_choice_is_said(monkeypatch: pytest.MonkeyPatch, lib: native.Native) -> None:
    assert kernels.choice() == f"native ({lib.isa}), {torch.get_num_threads()} threads"
    monkeypatch.setenv("TERNQ_KERNEL", "torch")
    module, x = layer(), normal(3, 320)
    assert kernels.choice() == "torch"
    assert torch.equal(module(x), F.linear(x, module.dequantized(), module.bias))
    assert not hasattr(module, "words")
    monkeypatch.setenv("TERNQ_KERNEL", "triton")
    assert kernels.choice() == "torch (TERNQ_KERNEL is 'triton')"
    monkeypatch.setenv("TERNQ_KERNEL", "cuda")
    with pytest.raises(RecipeError, match="'cuda'"):
        kernels.choice()


def test_missing_kernels_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: (None, "no compiler"))
    monkeypatch.setattr(kernels, "_warned", False)
    module, x = layer(), normal(3, 320)
    with pytest.warns(UserWarning, match="missing .no compiler"):
        found = module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(found, module(x))
    assert kernels.choice() == "torch (no compiler)"
    monkeypatch.setenv("TERNQ_KERNEL", "native")
    with pytest.raises(RecipeError, match="missing: no compiler"):
        kernels.choice()


@pytest.mark.parametrize("command", ["/bin/false", "no-such-compiler-anywhere"])
def test_a_compiler_that_fails_leaves_nothing(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", command)
    assert command in (builder.build(tmp_path / "x.so") or "")
    assert not list(tmp_path.iterdir())


def test_another_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"no library")
    with pytest.raises(OSError):
        native.Native(tmp_path / "x.so")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    sources = [ROOT / "tests" / "kernels.c", *(builder.HERE / "csrc").glob("*.c")]
    program = tmp_path / "kernels"
    compiler = builder.compiler()
    assert compiler is not None
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g", "-O1", "-std=c11"]
    where = [f"-I{builder.HERE / 'csrc'}", "-o", str(program), *map(str, sources), "-pthread"]
    subprocess.run([*compiler, *flags, *where, "-lm"], check=True)
    done = subprocess.run([program, "100"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
