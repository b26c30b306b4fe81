"""Tokenizers from the metadata of GGUF files, as a `tokenizers.Tokenizer`.

A GGUF file (ggml, `docs/gguf.md`) names its tokenizer family
(`tokenizer.ggml.model`) and, for byte-level BPE, its pre-tokenizer (`tokenizer.ggml.pre`); the regular expressions
below are those the models were trained with, as their publishers state them in `tokenizer.json`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.checkpoints.gguf_file import GGUFFile


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_ENGLISH = r"'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = _ENGLISH + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = rf"(?i:{_ENGLISH})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}" + _CL100K_ENDS
_QWEN2 = rf"(?i:{_ENGLISH})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}" + _CL100K_ENDS
_QWEN35 = (
    rf"(?i:{_ENGLISH})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER
_CASED_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED}*{_LOWER}+|{_CASED}+{_LOWER}*|\p{{N}}" + _CASED_ENDS
_O200K = rf"{_CASED}*{_LOWER}+(?i:{_ENGLISH})?|{_CASED}+{_LOWER}*(?i:{_ENGLISH})?|\p{{N}}{{1,3}}" + _CASED_ENDS
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class Pre:
    """One byte-level pre-tokenizer: each pattern in turn splits what the one before left.

    `add_bos` is the default where the file does not say; `nfc` asks for Unicode NFC first; with `ignore_merges` a
    word that is a whole token is taken as such.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_LLAMA3 = Pre((_CL100K,), ignore_merges=True, add_bos=True)
_SMOLLM = Pre((r"\p{N}", _GPT2))
_PRE: Mapping[str, Pre] = {
    "default": Pre(_DEFAULT),
    "gpt-2": Pre((_GPT2,)),
    "phi-2": Pre((_GPT2,)),
    "olmo": Pre((_GPT2,)),
    "mpt": Pre((_GPT2,)),
    "jais": Pre((_GPT2,)),
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "command-r": _SMOLLM,
    "exaone": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "smaug-bpe": Pre((_CL100K,)),
    "dbrx": Pre((_CL100K,)),
    "chatglm-bpe": Pre((_CL100K,)),
    "glm4": Pre((_CL100K,)),
    "qwen2": Pre((_QWEN2,), nfc=True),
    "qwen35": Pre((_QWEN35,), nfc=True),
    "stablelm2": Pre((_QWEN2,)),
    "deepseek-r1-qwen": Pre((_QWEN2,)),
    "tekken": Pre((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": Pre((_O200K,)),
    "deepseek-v3": Pre((r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3)),
    "falcon": Pre(_FALCON),
}


@dataclass(frozen=True)
class GGUFTokenizer:
    """What a GGUF file says about its tokenizer.

    `special_tokens` maps Hugging Face's names ("bos_token", ...) to token texts; `chat_template` is one template, or
    several by name, or None.
    """

    backend: Tokenizer
    special_tokens: dict[str, str]
    bos_id: int | None
    eos_ids: frozenset[int]
    chat_template: str | dict[str, str] | None = field(default=None, repr=False)


def load_gguf_tokenizer(path: str | Path) -> GGUFTokenizer:
    """Build the tokenizer that a GGUF file holds.

    Raises ValueError, naming the file, when it holds none, or one of a family or pre-tokenizer not known here.
    """
    metadata = GGUFFile(path).metadata
    try:
        facts = _Facts(metadata)
        family = facts.get("model", None)
        if family not in _BUILDERS:
            raise ValueError(
                f"tokenizer.ggml.model {family!r} is not supported, only {sorted(_BUILDERS)}; "
                "give a Hugging Face tokenizer folder with tokenizer=..."
            )
        backend, add_bos = _BUILDERS[family](facts)
        backend.add_tokens(facts.added(TokenType.USER_DEFINED))
        backend.add_special_tokens(facts.added(TokenType.CONTROL, TokenType.UNKNOWN))
        bos, eos = facts.text("bos_token_id"), facts.text("eos_token_id")
        _set_affixes(
            backend,
            bos if facts.get("add_bos_token", add_bos) else None,
            eos if facts.get("add_eos_token", False) else None,
        )
    except ValueError as error:
        raise ValueError(f"cannot read the tokenizer of {path}: {error}") from error
    names = {"bos_token": bos, "eos_token": eos, "unk_token": facts.text("unknown_token_id")}
    names["pad_token"] = facts.text("padding_token_id")
    ends = (facts.get(key, None) for key in ("eos_token_id", "eot_token_id", "eom_token_id"))
    return GGUFTokenizer(
        backend=backend,
        special_tokens={name: text for name, text in names.items() if text is not None},
        bos_id=facts.get("bos_token_id", None),
        eos_ids=frozenset(end for end in ends if end is not None),
        chat_template=_chat_templates(metadata),
    )


class _Facts:
    """The `tokenizer.ggml.*` values of one file."""

    def __init__(self, metadata: Mapping[str, Any]):
        self.metadata = metadata
        self.tokens: list[str] = self.get("tokens", [])
        if not self.tokens:
            raise ValueError("it has no tokenizer.ggml.tokens; give a tokenizer folder with tokenizer=...")
        self.types: list[int] = self.get("token_type", None) or [TokenType.NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise ValueError(f"{len(self.types)} token types for {len(self.tokens)} tokens")
        self.vocab = {token: index for index, token in enumerate(self.tokens)}

    def get(self, key: str, default):
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def text(self, key: str) -> str | None:
        """The text of the token that a metadata key names, None where the key is absent."""
        index = self.get(key, None)
        if index is None:
            return None
        if not 0 <= index < len(self.tokens):
            raise ValueError(f"tokenizer.ggml.{key} is {index}, the vocabulary ends at {len(self.tokens) - 1}")
        return self.tokens[index]

    def added(self, *types: TokenType) -> list[AddedToken]:
        """Tokens cut out of the raw text before anything else."""
        special = TokenType.USER_DEFINED not in types
        pairs = zip(self.tokens, self.types, strict=True)
        return [AddedToken(text, special=special, normalized=False) for text, kind in pairs if kind in types and text]


def _chat_templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    default, prefix = metadata.get("tokenizer.chat_template"), "tokenizer.chat_template."
    named = {key.removeprefix(prefix): text for key, text in metadata.items() if key.startswith(prefix)}
    return {**named, "default": default} if named and default else named or default


def _set_affixes(backend: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Add the beginning and end tokens to what `encode(..., add_special_tokens=True)` returns."""
    if bos is None and eos is None:
        return
    ids = [(text, backend.token_to_id(text)) for text in dict.fromkeys((bos, eos)) if text is not None]
    single = [part for part in (bos, "$A", eos) if part is not None]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def _byte_level(facts: _Facts) -> tuple[Tokenizer, bool]:
    """Byte-level BPE (the GPT-2 family): merges by rank over words that the pre-tokenizer cut."""
    name = facts.get("pre", "default")
    if name not in _PRE:
        raise ValueError(
            f"tokenizer.ggml.pre {name!r} is not supported, only {sorted(_PRE)}; "
            "give a Hugging Face tokenizer folder with tokenizer=..."
        )
    pre = _PRE[name]
    merges = [tuple(merge.split(" ", 1)) for merge in facts.get("merges", ())]
    wrong = next((i for i, merge in enumerate(merges) if len(merge) != 2), None)
    if wrong is not None:
        raise ValueError(f"merge {wrong} {merges[wrong][0]!r} is not two tokens")
    backend = _tokenizer(lambda: models.BPE(facts.vocab, merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    bytes_to_chars = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_to_chars])
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(facts: _Facts) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE: merges in the order of the scores of what they make, unknown characters as byte tokens."""
    merges = _merges_from_scores(facts)
    unknown = facts.text("unknown_token_id")
    backend = _tokenizer(lambda: models.BPE(facts.vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = facts.get("add_space_prefix", True)
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend, True


def _merges_from_scores(facts: _Facts) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best score first (ties: by the parts' ids)."""
    scores = facts.get("scores", None)
    if scores is None or len(scores) != len(facts.tokens):
        raise ValueError(f"{len(scores or ())} tokenizer.ggml.scores for {len(facts.tokens)} tokens")
    usable = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    kinds = dict(zip(facts.tokens, facts.types, strict=True))
    ids = {token: index for token, index in facts.vocab.items() if kinds[token] in usable}
    found = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], left, right, cut, token))
    found.sort()
    return [(token[:cut], token[cut:]) for _, _, _, cut, token in found]


def _tokenizer(make: Callable[[], Any]) -> Tokenizer:
    try:
        return Tokenizer(make())
    except Exception as error:  # the Rust side raises plain Exception, e.g. for a merge of unknown tokens
        raise ValueError(f"its vocabulary and merges do not fit together: {error}") from error


_BUILDERS: Mapping[str, Callable[[_Facts], tuple[Tokenizer, bool]]] = {"gpt2": _byte_level, "llama": _sentencepiece}
