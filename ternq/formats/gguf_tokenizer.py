"""A tokenizer as llama.cpp knows it, from ``tokenizer.json``.

llama.cpp has two kinds of interest here. Byte-level BPE (``gpt2``) has merges, and a name for the
way text is cut before them; the name stands for regular expressions inside llama.cpp, so only a
tokenizer that cuts in exactly one of these ways can be expressed. SentencePiece (``llama``) has a
score for each token instead of merges: the pair of the best score is joined first.

Sources: ``src/llama-vocab.cpp`` of llama.cpp; the regular expressions are read from it.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ternq.errors import InputError, RecipeError
from ternq.files import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_AFTER = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_AFTER_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _by_case(end: str) -> str:
    """Words that are cut where a lower-case letter is followed by an upper-case one."""
    return f"{_BEFORE}{_UPPER}*{_LOWER}+{end}|{_BEFORE}{_UPPER}+{_LOWER}*{end}"


_LLAMA3 = _CONTRACTION + "|" + _BEFORE + r"\p{L}+|\p{N}{1,3}" + _AFTER
SPLITS = {
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "smaug-bpe",
    (_CONTRACTION + "|" + _BEFORE + r"\p{L}+|\p{N}" + _AFTER, False): "qwen2",
    (_by_case("") + r"|\p{N}" + _AFTER_SLASH, True): "tekken",
    (_by_case(_CONTRACTION + "?") + r"|\p{N}{1,3}" + _AFTER_SLASH, False): "gpt-4o",
}
"""Regular expression of the cut, and ``ignore_merges`` -> llama.cpp's name."""
# what the functions below raise where a part is missing or of another type
_DAMAGES = (KeyError, ValueError, TypeError, AttributeError, IndexError, StopIteration)
_HINT = "--format dense keeps tokenizer.json as it is."


@dataclass(frozen=True)
class Vocabulary:
    """What the header of a file says of the tokenizer.

    ``model`` is ``gpt2`` (with ``pre`` and ``merges``) or ``llama`` (with ``scores``). ``ids`` has
    the special tokens: bos, eos, unknown, padding. ``add_prefix``: a space goes before the text.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_prefix: bool
    chat_template: str | None
    notes: list[str] = field(default_factory=list)


def vocabulary(base: Path, size: int, config: Mapping[str, Any], lossy: bool) -> Vocabulary:
    """The tokenizer of a model folder whose embedding has ``size`` rows.

    Raises:
        InputError: it is damaged.
        RecipeError: it is missing, or cannot be expressed. With ``lossy`` an unknown way to cut
            text becomes llama.cpp's default, which is noted.
    """
    if not (base / "tokenizer.json").is_file():
        raise RecipeError(f"{base} has no tokenizer.json to write to a GGUF file.", _HINT)
    try:
        return _vocabulary(base, size, config, lossy)
    except _DAMAGES as error:
        raise InputError(
            f"The tokenizer in {base} is damaged: its files are not as transformers writes them."
        ) from error


def _vocabulary(base: Path, size: int, config: Mapping[str, Any], lossy: bool) -> Vocabulary:
    data = read_json(base / "tokenizer.json")
    settings = read_json(base / "tokenizer_config.json") if _has_settings(base) else {}
    kind, model = _kind(data), data["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    tokens, types = _tokens(data, size)
    ids = _ids(settings, config, tokens)
    first, last = _template(data, settings)
    notes: list[str] = []
    pre = "default"
    if kind == "gpt2":
        pre = _pre(data, lossy, notes)
        if not merges:
            raise RecipeError("The tokenizer has no merges, which llama.cpp wants.", _HINT)
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        merges=merges if kind == "gpt2" else None,
        scores=None if kind == "gpt2" else _scores(model["merges"], tokens),
        ids=ids,
        add_bos="bos" in ids and tokens[ids["bos"]] in first,
        add_eos="eos" in ids and tokens[ids["eos"]] in last,
        add_prefix=kind == "llama" and _adds_space(data),
        chat_template=_chat_template(base, settings),
        notes=notes,
    )


def _has_settings(base: Path) -> bool:
    return (base / "tokenizer_config.json").is_file()


def _kind(data: Mapping[str, Any]) -> str:
    """``gpt2`` or ``llama``; RecipeError for other tokenizers."""
    model = data.get("model") or {}
    steps = [step.get("type") for step in _steps(data.get("pre_tokenizer"), "pretokenizers")]
    if model.get("type") == "BPE" and "ByteLevel" in steps:
        return "gpt2"
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        return "llama"
    raise RecipeError(
        f"The tokenizer ({model.get('type')}) is neither byte-level BPE nor BPE with byte "
        "fallback, and others are not written to GGUF.",
        _HINT,
    )


def _steps(part: Mapping[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer; sequences are laid flat."""
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [dict(part)]
    return list(itertools.chain(*(_steps(step, inside) for step in part[inside])))


def _pre(data: Mapping[str, Any], lossy: bool, notes: list[str]) -> str:
    """llama.cpp's name for how text is cut."""
    found = _known_pre(data)
    normalizers = [s.get("type") for s in _steps(data.get("normalizer"), "normalizers")]
    if normalizers == ["NFC"]:
        notes.append("The tokenizer normalizes text to NFC first; llama.cpp does not.")
        normalizers = []
    if found is not None and not normalizers:
        return found
    what = f"changes text first ({normalizers[0]})" if normalizers else "cuts text"
    if not lossy:
        raise RecipeError(
            f"The tokenizer {what} in a way that llama.cpp has no name for.",
            _HINT + " Or --lossy takes llama.cpp's default.",
        )
    notes.append(
        f"The tokenizer {what} in a way that llama.cpp has no name for: its default is "
        "taken, and texts become other tokens."
    )
    return "default"


def _known_pre(data: Mapping[str, Any]) -> str | None:
    steps = _steps(data.get("pre_tokenizer"), "pretokenizers")
    ignore_merges = bool(data["model"].get("ignore_merges"))
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(before) > 1:
        return None
    own_cut = last.get("use_regex", True)
    if not before:
        return "gpt-2" if own_cut and not ignore_merges else None
    step = before[0]
    if step.get("type") == "Digits":
        fits = step.get("individual_digits") and own_cut and not ignore_merges
        return "smollm" if fits else None
    isolated = (step.get("behavior"), step.get("invert")) in [
        ("Isolated", False),
        ("Removed", True),
    ]
    if step.get("type") != "Split" or own_cut or not isolated:
        return None
    return SPLITS.get((str((step.get("pattern") or {}).get("Regex")), ignore_merges))


def _tokens(data: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding; rows without a token are padding."""
    vocab: dict[str, int] = data["model"]["vocab"]
    added = {token["id"]: token for token in data.get("added_tokens") or ()}
    by_id = {number: text for text, number in vocab.items()}
    by_id |= {number: token["content"] for number, token in added.items()}
    if not all(isinstance(text, str) for text in by_id.values()):
        raise TypeError("a token is no text")
    if max(by_id) >= size:
        raise RecipeError(
            f"The tokenizer has token {max(by_id)}, and the embedding only {size} rows.", _HINT
        )
    unknown = data["model"].get("unk_token")
    tokens, types = [], []
    for number in range(size):
        text = by_id.get(number, f"[PAD{number}]")
        tokens.append(text)
        types.append(_type(text, added.get(number), number in by_id, text == unknown))
    return tokens, types


def _type(text: str, added: Mapping[str, Any] | None, known: bool, is_unknown: bool) -> int:
    if not known:
        return UNUSED
    if is_unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    return BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else NORMAL


def _scores(merges: list[Any], tokens: list[str]) -> list[float]:
    """A score for each token, so that the best pair is the one BPE would merge first.

    Raises:
        RecipeError: merges that give one token stand apart, which no score can express.
    """
    results = ["".join(m.split(" ", 1) if isinstance(m, str) else m) for m in merges]
    order = [text for text, _ in itertools.groupby(results)]
    if len(set(order)) != len(order):
        raise RecipeError("The tokenizer's merges are in no order that scores can express.", _HINT)
    rank = {text: -float(place) for place, text in enumerate(order, 1)}
    worst = -float(len(order) + 1)
    return [rank.get(text, worst if len(text) > 1 else 0.0) for text in tokens]


def _adds_space(data: Mapping[str, Any]) -> bool:
    """Whether a space goes before the text, as SentencePiece does it."""
    normalizers = _steps(data.get("normalizer"), "normalizers")
    cuts = _steps(data.get("pre_tokenizer"), "pretokenizers")
    prepends = any(step.get("type") == "Prepend" for step in normalizers)
    schemes = [s.get("prepend_scheme", "always") for s in cuts if s.get("type") == "Metaspace"]
    return prepends or any(scheme != "never" for scheme in schemes)


def _ids(
    settings: Mapping[str, Any], config: Mapping[str, Any], tokens: list[str]
) -> dict[str, int]:
    """Special tokens by the tokenizer's settings, or else by the model's configuration."""
    found: dict[str, int] = {}
    keys = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for name, key in keys.items():
        token = settings.get(f"{key}_token")
        text = token.get("content") if isinstance(token, dict) else token
        number = config.get(f"{key}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if text in tokens:
            found[name] = tokens.index(text)
        elif isinstance(number, int) and 0 <= number < len(tokens):
            found[name] = number
    return found


def _template(data: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """The special tokens that stand before and after every text."""
    first: set[str] = set()
    last: set[str] = set()
    for step in _steps(data.get("post_processor"), "processors"):
        if step.get("type") == "TemplateProcessing":
            parts = [next(iter(part.items())) for part in step["single"]]
            text = [kind for kind, _ in parts].index("Sequence")
            first |= {part["id"] for _, part in parts[:text]}
            last |= {part["id"] for _, part in parts[text + 1 :]}
    for names, key in ((first, "bos"), (last, "eos")):
        token = settings.get(f"{key}_token")
        if settings.get(f"add_{key}_token") and token:
            names.add(token["content"] if isinstance(token, dict) else token)
    return first, last


def _chat_template(base: Path, settings: Mapping[str, Any]) -> str | None:
    if (base / "chat_template.jinja").is_file():
        return (base / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
