"""The tokeniser: one face for Hugging Face folders, hub ids and GGUF files."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from jaxserve.chat import ChatTemplate, read_chat_template, render_chat
from jaxserve.text.decoding import Pieces, read_decoder
from jaxserve.text.hf_classes import Unusual
from jaxserve.text.hf_folder import read_folder
from jaxserve.tokenizers_gguf import load_gguf_tokenizer

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
MODES = ("auto", "hf")


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads.

    Attributes:
        backend: the Rust tokenizer; do not change its settings.
        bos_id: the beginning-of-sequence id, or None.
        eos_ids: ids that end a sequence, as far as the tokenizer's files tell.
        chat_template: Jinja text, several of them by name, or None.
        special_tokens: Hugging Face's names ("bos_token", ...) and the tokens' texts.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        make_hf: Callable[[], Any],
        *,
        bos_id: int | None,
        eos_ids: frozenset[int],
        special_tokens: Mapping[str, Any],
        chat_template: str | Mapping[str, str] | None,
    ):
        self.backend, self._make_hf = backend, make_hf
        self.bos_id, self.eos_ids = bos_id, eos_ids
        self.special_tokens, self.chat_template = dict(special_tokens), chat_template
        self._compile = lru_cache(maxsize=16)(lambda source: ChatTemplate(source, self.special_tokens))
        # Limits and padding left in tokenizer.json would cut or lengthen prompts silently.
        backend.no_truncation()
        backend.no_padding()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` adds what the model wants around it (often a first token).

        Raises TypeError when it is no string, ValueError when it holds half of a surrogate pair.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[Any], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, computed in parallel; raises as `encode`, naming the index."""
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {i} must be a string, not {type(text).__name__}")
            if not text.isascii():
                _check_unicode(text, i)
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """The text of all `ids` together; ids without a token are skipped."""
        return self.backend.decode(_ints(ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself, leading space included; part of a character shows as U+FFFD."""
        if self.pieces is None:
            return self.backend.decode([token_id], skip_special_tokens=False)
        piece = self.pieces[token_id]
        return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")

    def render_chat(
        self,
        messages: Any,
        *,
        chat_template: str | Path | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Any = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation; encode it with `add_special_tokens=False`.

        `messages` is a list of mappings with role and content; `chat_template` is a path, Jinja text, or the name of
        one of the tokenizer's templates. See `jaxserve.chat.render_chat` for the rest and the errors.
        """
        template = self._compile(self._choose_template(chat_template, tools))
        return render_chat(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **variables,
        )

    def _choose_template(self, chosen: str | Path | None, tools: Any) -> str:
        own = self.chat_template
        named = own if isinstance(own, Mapping) else {} if own is None else {"default": own}
        if chosen is not None:
            return named[chosen] if isinstance(chosen, str) and chosen in named else read_chat_template(chosen)
        if tools and "tool_use" in named:
            return named["tool_use"]
        if "default" in named:
            return named["default"]
        have = f"only those named {sorted(named)}" if named else "none"
        raise ValueError(
            f"the tokenizer has no default chat template ({have}): give chat_template=<path, Jinja text or name>, "
            "or render the prompt yourself and use generate"
        )

    @cached_property
    def hf(self) -> Any:
        """The `transformers.PreTrainedTokenizerFast`, loaded when asked for; its settings do not reach the engine."""
        return self._make_hf()

    @cached_property
    def vocab_size(self) -> int:
        """The largest token id plus one."""
        return max(self._vocab.values(), default=-1) + 1

    @cached_property
    def max_chars_per_token(self) -> int:
        """Length of the longest token: a text of more than this times `n` characters has more than `n` tokens.

        Normalisers that shorten text (composing accents, collapsing spaces) can beat it, by a small factor.
        """
        return max(map(len, self._vocab), default=1)

    @cached_property
    def added_tokens(self) -> dict[int, str]:
        """Tokens found in the raw text before anything else, such as `<|im_end|>`."""
        return {index: token.content for index, token in self.backend.get_added_tokens_decoder().items()}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def pieces(self) -> Pieces | None:
        """What each token stands for, or None when this depends on its neighbours."""
        return read_decoder(self.backend)

    @property
    def _vocab(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)


def load_tokenizer(
    path: str | Path,
    *,
    tokenizer_mode: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    chat_template: str | Path | None = None,
) -> Tokenizer:
    """Load a tokenizer from a folder in Hugging Face's format, a `.gguf` file, or a hub id.

    Only a hub id touches the network. Code in the folder is never run.

    Args:
        tokenizer_mode: "auto" or "hf".
        revision, token: version and credentials for a hub id.
        chat_template: path or Jinja text used instead of the tokenizer's own.

    Raises:
        ValueError: an unknown mode, no tokenizer at `path`, a tokenizer that cannot be read or has no fast (Rust)
            form.
    """
    if tokenizer_mode not in MODES:
        raise ValueError(f"tokenizer_mode {tokenizer_mode!r} is not supported: choose one of {MODES}")
    template = None if chat_template is None else read_chat_template(chat_template)
    if Path(path).suffix == ".gguf":
        return _load_gguf(Path(path), template)
    return _load_hf(str(path), revision, token, template)


def _load_gguf(path: Path, template: str | None) -> Tokenizer:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    facts = load_gguf_tokenizer(path)
    templates = template or facts.chat_template
    return Tokenizer(
        facts.backend,
        partial(_wrap_hf, facts.backend, facts.special_tokens, templates),
        bos_id=facts.bos_id,
        eos_ids=facts.eos_ids,
        special_tokens=facts.special_tokens,
        chat_template=templates,
    )


def _wrap_hf(backend: tokenizers.Tokenizer, special_tokens: dict[str, str], template: Any) -> Any:
    # transformers takes 2 s to import, which an engine that reads GGUF can do without.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **special_tokens
    )


def _load_hf(path: str, revision: str | None, token: str | bool | None, template: str | None) -> Tokenizer:
    folder = Path(path)
    load = partial(_auto_tokenizer, path, revision, token, template)
    if folder.exists() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{path} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}): name another one with tokenizer=..., "
            "or use token ids alone with skip_tokenizer_init=True"
        )
    if not folder.exists():
        return _from_transformers(load, "it is no folder of this machine", path)
    try:
        facts = read_folder(folder)
    except Unusual as reason:
        return _from_transformers(load, str(reason), path)
    except Exception as error:  # the Rust side raises plain ones
        raise _unreadable(path, error) from error
    names, templates = facts.special_tokens, template or facts.chat_template
    return Tokenizer(
        facts.backend,
        partial(_wrap_hf, facts.backend, names, templates) if facts.class_differs else load,
        bos_id=facts.id_of("bos_token"),
        eos_ids=frozenset(() if (end := facts.id_of("eos_token")) is None else (end,)),
        special_tokens=names,
        chat_template=templates,
    )


def _auto_tokenizer(path: str, revision: str | None, token: str | bool | None, template: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(
            path,
            use_fast=True,
            trust_remote_code=False,
            local_files_only=Path(path).is_dir(),
            revision=revision,
            token=token,
        )
    except Exception as error:  # transformers raises many kinds, tokenizers plain Exception
        raise _unreadable(path, error) from error
    if not hf.is_fast:
        raise ValueError(f"{path} has only a slow (Python) tokenizer; a tokenizer.json is needed")
    if template is not None:
        hf.chat_template = template
    return hf


def _from_transformers(load: Callable[[], Any], reason: str, path: str) -> Tokenizer:
    logger.info("transformers reads the tokenizer of %s, which takes some seconds: %s", path, reason)
    hf = load()
    return Tokenizer(
        hf.backend_tokenizer,
        partial(copy.deepcopy, hf),
        bos_id=hf.bos_token_id,
        eos_ids=frozenset(() if hf.eos_token_id is None else (hf.eos_token_id,)),
        special_tokens=hf.special_tokens_map,
        chat_template=hf.chat_template,
    )


def _unreadable(path: str, error: Exception) -> ValueError:
    return ValueError(
        f"cannot load the tokenizer of {path!r}: {error}; name another one with tokenizer=..., or use token ids "
        "alone with skip_tokenizer_init=True"
    )


def _check_unicode(text: str, index: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text {index} holds half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}"
        ) from error


def _ints(ids: Sequence[int] | np.ndarray) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
