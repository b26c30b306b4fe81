"""Text in and text out: tokenisers, incremental detokenisation and stop strings."""

from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Detokenizer", "Tokenizer", "load_tokenizer"]
