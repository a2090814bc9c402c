"""The native decoder computes what transformers' forward computes, step by step."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_pack import LLAMA_LIKE, VOCABULARY, loaded
from torch import Tensor
from transformers import AutoModelForCausalLM

from ternq import hf, kernels
from ternq.decoder import BATCH, Decoder, obstacle
from ternq.kernels import build
from ternq.linear import prepare
from ternq.pack import pack
from ternq.recipe import Scheme

if kernels.native.load()[0] is None:
    pytest.skip(kernels.native.load()[1], allow_module_level=True)

LONG = {**LLAMA_LIKE, "max_position_embeddings": 200}
TIED = {"tie_word_embeddings": True}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20, "hidden_size": 44}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LONG),
    "llama-tied-bias": ("LlamaConfig", {**LONG, **TIED, "attention_bias": True, "mlp_bias": True}),
    "llama-grouped": ("LlamaConfig", {**LONG, **GROUPED}),
    "mistral": ("MistralConfig", {**LONG, "sliding_window": None}),
    "qwen2": ("Qwen2Config", LONG),
    "qwen3": ("Qwen3Config", {**LONG, "head_dim": 32}),
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 50},
}
for _name, _values in ROPES.items():
    _rope = {"rope_type": _name, "rope_theta": 10000.0, **_values}
    CASES[f"rope-{_name}"] = ("LlamaConfig", {**LONG, "rope_parameters": _rope})


def packed(path: Path, case: str, dtype: torch.dtype | None = None, **packing: Any) -> Any:
    """A random model, packed and loaded again."""
    name, options = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**options))
    prepare(model, Scheme(group_size=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    pack(loaded(model.eval()), path, **packing)
    return hf.load(str(path), dtype=dtype).model


def text(length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def forward(model: Any, ids: Tensor) -> Tensor:
    """Logits after every token, by transformers."""
    with torch.inference_mode():
        found: Tensor = model(ids.unsqueeze(0)).logits[0].float()
    return found


def steps(decoder: Decoder, ids: Tensor, position: int = 0) -> Tensor:
    """The same, token by token."""
    rows = [decoder.logits([token], position + i).clone() for i, token in enumerate(ids.tolist())]
    return torch.stack(rows)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-3) -> bool:
    """Within a thousandth of the logits' deviation: activations are rounded to 16 bits."""
    return float((found - expected).abs().max()) <= tolerance * float(expected.std())


@pytest.mark.parametrize("case", CASES)
def test_every_step_gives_the_logits_of_transformers(case: str, tmp_path: Path) -> None:
    model = packed(tmp_path / "out", case)
    assert obstacle(model, 200) is None
    ids = text(170)
    expected = forward(model, ids)
    with Decoder(model, 200, threads=1) as decoder:
        assert close(decoder.logits(ids.tolist(), 0), expected[-1])
        assert len(ids) > BATCH
        decoder.logits(ids[:140].tolist(), 0)
        assert close(steps(decoder, ids[140:], 140), expected[140:])
        assert close(steps(decoder, ids[:20]), expected[:20])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return packed(tmp_path_factory.mktemp("llama") / "out", "llama-grouped")


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_the_number_of_threads_changes_nothing(llama: Any, threads: int) -> None:
    """More than there are cores, heads or rows to share as well."""
    ids = text(40)
    with Decoder(llama, 64, threads=1) as one, Decoder(llama, 64, threads=threads) as several:
        assert torch.equal(one.logits(ids.tolist(), 0), several.logits(ids.tolist(), 0))
        assert torch.equal(steps(one, ids[:8], 40), steps(several, ids[:8], 40))


def test_an_earlier_position_forgets_what_came_after(llama: Any) -> None:
    ids, other = text(30), text(20, seed=2)
    with Decoder(llama, 64, threads=1) as decoder:
        decoder.logits(ids.tolist(), 0)
        found = decoder.logits(other.tolist(), 10).clone()
        assert close(found, forward(llama, torch.cat([ids[:10], other]))[-1])
        assert close(decoder.logits(other.tolist(), 0), forward(llama, other)[-1])


def test_the_whole_context_and_no_more(llama: Any) -> None:
    ids = text(24)
    with Decoder(llama, 24, threads=2) as decoder:
        assert close(steps(decoder, ids), forward(llama, ids))
        for bad, position in (([1], 24), ([1] * 25, 0), ([1], -1), ([], 0), ([VOCABULARY], 0)):
            with pytest.raises(ValueError):
                decoder.logits(bad, position)
        assert close(decoder.logits(ids.tolist(), 0), forward(llama, ids)[-1])
    decoder.close()
    with pytest.raises(ValueError, match="closed"):
        decoder.logits([1], 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("embeddings", ["keep", "int8"])
def test_embedding_and_head_are_read_as_they_are_stored(
    dtype: torch.dtype, embeddings: str, tmp_path: Path
) -> None:
    model = packed(tmp_path / "out", "llama", dtype, embeddings=embeddings)
    ids = text(20)
    with Decoder(model, 20) as decoder:
        found = steps(decoder, ids)
    assert close(found, forward(torch.nn.Module.float(model), ids))


def test_int8_activations_differ_a_little(llama: Any) -> None:
    ids = text(60)
    expected = forward(llama, ids)
    with Decoder(llama, 60, int8=True) as decoder:
        found = steps(decoder, ids)
    assert not close(found, expected)
    assert close(found, expected, tolerance=0.5)


def test_what_is_not_finite_is_not_hidden(tmp_path: Path) -> None:
    model = packed(tmp_path / "out", "llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = float("nan")
    with Decoder(model, 8) as decoder:
        assert bool(decoder.logits([1, 2], 0).isnan().all())


def test_what_cannot_be_run_is_said(tmp_path: Path) -> None:
    window = packed(tmp_path / "window", "mistral")
    window.config.sliding_window = 16
    assert obstacle(window, 16) is None
    assert "16 positions" in str(obstacle(window, 17))
    dense = hf.load("demo").model
    assert "not ternary" in str(obstacle(dense, 16))
    dense.config.rope_parameters["rope_type"] = "dynamic"
    assert "dynamic" in str(obstacle(dense, 16))
    dense.config.rope_parameters["rope_type"] = "default"
    dense.config.hidden_act = "gelu"
    assert "gelu" in str(obstacle(dense, 16))
    dense.model.rotary_emb.inv_freq = dense.model.rotary_emb.inv_freq[:4]
    assert "part" in str(obstacle(dense, 16))


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.parametrize("isa", ["portable", "best"])
def test_nothing_for_a_sanitizer(sanitizer: str, isa: str, tmp_path: Path) -> None:
    """Neither reads beyond what was allocated, nor undefined behaviour, nor races of threads."""
    compiler = build.compiler()
    if compiler is None:
        pytest.skip("no C compiler")
    sources = [str(p) for p in (build.HERE / "csrc").glob("*.c") if p.name != "decode.c"]
    program = tmp_path / "check"
    flags = ["-O1", "-g", "-std=c11", "-pthread", f"-fsanitize={sanitizer}"]
    flags += ["-fno-sanitize-recover=all", f"-I{build.HERE / 'csrc'}"]
    flags += ['-DISA="portable"'] if isa == "portable" else []
    own = str(Path(__file__).with_name("decode_check.c"))
    made = subprocess.run(
        [*compiler, *flags, own, *sources, "-o", str(program), "-lm"],
        capture_output=True,
        text=True,
    )
    if "fsanitize" in made.stderr or "cannot find -l" in made.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert made.returncode == 0, made.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "alike\n"), done.stderr
