"""Writing engine-ready checkpoints, which load without fusing or casting."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxserve.checkpoints import CheckpointError, find_model, read_generation_config
from jaxserve.checkpoints.orbax import MANIFEST, is_engine_ready, save_arrays
from jaxserve.weights import LoadedModel, load_model

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def save_checkpoint(loaded: LoadedModel, folder: Path, load_tokenizer: Callable[[Path], Any]) -> None:
    """Write an engine-ready checkpoint into an existing, empty folder.

    Args:
        loaded: the model; its config, generation config and tokenizer are taken from `loaded.plan.path`.
        folder: where to write.
        load_tokenizer: called with a GGUF file, gives its tokenizer as a transformers one (for `save_pretrained`).
    """
    config = {key: value for key, value in loaded.plan.hf_config.items() if key != "torch_dtype"}
    _write_json(folder / "config.json", config | {"dtype": loaded.dtype.name})
    if generation := read_generation_config(loaded.plan.path):
        _write_json(folder / "generation_config.json", generation)
    if loaded.plan.path.is_file():
        load_tokenizer(loaded.plan.path).save_pretrained(folder)
    else:
        for name in TOKENIZER_FILES:
            if (loaded.plan.path / name).is_file():
                shutil.copyfile(loaded.plan.path / name, folder / name)
    arrays = dict(zip(loaded.names, loaded.leaves, strict=True))
    save_arrays(folder, arrays, family=loaded.family, dtype=loaded.dtype.name)


def convert(
    model: str | Path | None,
    out: str | Path,
    *,
    load_tokenizer: Callable[[Path], Any],
    dtype: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    download_dir: str | Path | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Path:
    """Write a model as an engine-ready checkpoint that `load_model` restores without fusing or casting.

    Nothing appears at `out` before everything is written.

    Args:
        model, revision, token, download_dir: as for `find_model`.
        out: the folder to make.
        load_tokenizer: as for `save_checkpoint`.
        dtype: as for `load_model`.
        overwrite: whether an engine-ready checkpoint at `out` may be replaced.

    Returns:
        `out`.

    Raises:
        CheckpointError: the model cannot be read, or `out` holds something.
    """
    out = Path(out).expanduser().absolute()
    _check_free(out, overwrite)
    path = find_model(model, revision, token, download_dir)
    if path.resolve() == out.resolve():
        raise CheckpointError(f"{out} is the model itself; name another output folder")
    loaded = load_model(path, dtype=dtype, show_progress=show_progress)
    partial_folder = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    try:
        save_checkpoint(loaded, partial_folder, load_tokenizer)
        if out.exists():
            shutil.rmtree(out)
        partial_folder.rename(out)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return out


def _check_free(out: Path, overwrite: bool) -> None:
    """Raise unless `out` may be written: absent, empty, or an earlier conversion that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_engine_ready(out):
        raise CheckpointError(f"{out} exists and holds something other than a converted model; name another folder")
    if not overwrite:
        raise CheckpointError(
            f"{out} already holds a converted model ({MANIFEST}); name another folder or overwrite it"
        )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
