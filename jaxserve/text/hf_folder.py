"""Tokenizers of Hugging Face folders, from their files alone: what `AutoTokenizer` makes of them, without its import.

transformers takes seconds to load (and loads torch where it is installed), so that it is left to folders that cannot
be read without it: those without a tokenizer.json, with code of their own, or of a class that is not known here.
"""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from jaxserve.text.hf_classes import FILE_AS_IT_IS, RECIPES, Unusual, build, choose_class, is_byte_level

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Settings that change what is made of tokenizer.json in ways that are not read here.
UNREAD = ("fast_tokenizer_files", "fix_mistral_regex", "init_inputs")

Token = str | AddedToken


@dataclass(frozen=True)
class FolderTokenizer:
    """What a folder says about its tokenizer.

    Attributes:
        special_tokens: Hugging Face's names ("bos_token", ...) and the tokens' texts.
        chat_template: one template, or several by name, or None.
        class_differs: `AutoTokenizer` makes something else of the folder, of no use with its vocabulary.
    """

    backend: Tokenizer
    special_tokens: dict[str, str]
    chat_template: str | dict[str, str] | None = field(repr=False)
    class_differs: bool = False

    def id_of(self, name: str) -> int | None:
        """The id of the special token of this name, None where the folder names none."""
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)


@dataclass(frozen=True)
class _Tokens:
    """The tokens that a folder's files list besides the vocabulary: by name, without one, and by id."""

    named: dict[str, Token]
    unnamed: list[Token]
    added: dict[int, AddedToken]


def read_folder(folder: Path) -> FolderTokenizer:
    """The tokenizer of a folder with a tokenizer.json.

    Raises:
        Unusual: transformers is needed; says why.
        Exception: a file cannot be read; of many kinds, since the Rust side raises plain ones.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise Unusual("it has no tokenizer.json")
    settings, model = _read_json(folder / "tokenizer_config.json"), _read_json(folder / "config.json")
    _check_usual(folder, settings)
    name = choose_class(settings, model)
    content = None if name == FILE_AS_IT_IS else _read_json(path)
    # Folders of byte-level models name LlamaTokenizer, too, which transformers knows by their hub ids.
    differs = content is not None and not RECIPES[name].byte_level and is_byte_level(content)
    recipe = None if content is None or differs else RECIPES[name]
    if recipe is None or content is None:
        backend = Tokenizer.from_file(str(path))
        tokens = _read_tokens(folder, settings, backend.get_added_tokens_decoder(), backend.padding)
    else:
        in_file = {token["id"]: _added_token(token) for token in content.get("added_tokens", ())}
        tokens = _read_tokens(folder, {**recipe.tokens, **settings}, in_file, content.get("padding"))
        backend = build(name, content, settings, tokens.named)
    _add_tokens(backend, tokens)
    if recipe is not None and recipe.adds_special:
        every = dict.fromkeys(str(token) for token in (*tokens.named.values(), *tokens.unnamed))
        backend.add_tokens([AddedToken(text, special=True) for text in every])
    backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    return FolderTokenizer(
        backend=backend,
        special_tokens={key: str(token) for key, token in tokens.named.items()},
        chat_template=_chat_template(folder, settings),
        class_differs=differs,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def _check_usual(folder: Path, settings: Mapping[str, Any]) -> None:
    code = settings.get("auto_map")
    if isinstance(code, list) or (isinstance(code, dict) and "AutoTokenizer" in code):
        raise Unusual("it names code of its own (auto_map)")
    for key in UNREAD:
        if settings.get(key):
            raise Unusual(f"its tokenizer_config.json sets {key}")
    if (folder / "tekken.json").is_file() and importlib.util.find_spec("mistral_common") is not None:
        raise Unusual("mistral_common reads its tekken.json")


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    return AddedToken(**{key: value for key, value in entry.items() if key not in ("id", "__type")})


def _read_tokens(
    folder: Path,
    settings: Mapping[str, Any],
    in_file: Mapping[int, AddedToken],
    padding: Mapping[str, Any] | None,
) -> _Tokens:
    """The special and added tokens of tokenizer_config.json or, where it lists none, of the older files.

    `in_file` and `padding` are what tokenizer.json says about added tokens, by id, and about padding.
    """
    values = dict(settings)
    if "added_tokens_decoder" in settings:
        added = {int(index): _added_token(token) for index, token in settings["added_tokens_decoder"].items()}
    else:
        values |= _read_special_tokens_map(folder)
        added = dict(in_file)
        for text, index in _read_json(folder / "added_tokens.json").items():
            if index not in in_file or in_file[index].content != text:
                raise Unusual("its added_tokens.json and tokenizer.json differ")
    if padding is not None:
        values.setdefault("pad_token", padding["pad_token"])
    unnamed = values.get("extra_special_tokens", values.get("additional_special_tokens")) or []
    others = [key for key in values if key.endswith("_token") and key not in NAMES]
    named = {key: _as_token(values[key]) for key in NAMES if values.get(key) is not None}
    by_text = {token.content: token for token in added.values()}
    named = {key: by_text.get(str(token), token) for key, token in named.items()}
    named |= {key: _as_token(values[key]) for key in others if isinstance(values[key], str | dict | AddedToken)}
    if isinstance(unnamed, dict):
        named |= {key: _as_token(token) for key, token in unnamed.items()}
        unnamed = []
    return _Tokens(named, [_as_token(token) for token in unnamed], added)


def _read_special_tokens_map(folder: Path) -> dict[str, Any]:
    values = _read_json(folder / "special_tokens_map.json")
    if "extra_special_tokens" in values:
        raise Unusual("its special_tokens_map.json lists extra_special_tokens")
    return {
        key: AddedToken(**{**value, "special": True}) if isinstance(value, dict) else value
        for key, value in values.items()
    }


def _as_token(value: Any) -> Token:
    """A token's text, or the token with its flags, which tokenizer_config.json marks by a "__type"."""
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return _added_token(value)
    if not isinstance(value, str | AddedToken):
        raise Unusual(f"it names a special token {value!r}")
    return value


def _add_tokens(backend: Tokenizer, tokens: _Tokens) -> None:
    """Add them to `backend`, or change the flags of those that it has; tokens that have a name become special."""
    new: list[Token] = [token for _, token in sorted(tokens.added.items())]
    known = {token.content for token in (*backend.get_added_tokens_decoder().values(), *tokens.added.values())}
    for token in (*tokens.named.values(), *tokens.unnamed):
        if str(token) not in known and token not in new:
            new.append(token)
    names = {str(token) for token in tokens.named.values()}
    for i, token in enumerate(new):
        if isinstance(token, str):
            new[i] = AddedToken(token, special=True)
        elif token.content in names:
            token.special = True
    if new:
        backend.add_tokens(new)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template files' texts, which come before what tokenizer_config.json holds."""
    paths = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        paths["default"] = folder / "chat_template.jinja"
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    if texts:
        return texts["default"] if list(texts) == ["default"] else texts
    own = settings.get("chat_template")
    return {entry["name"]: entry["template"] for entry in own} if isinstance(own, list) else own
