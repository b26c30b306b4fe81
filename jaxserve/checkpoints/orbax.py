"""Engine-ready checkpoints: parameters as the engine holds them (fused and cast), written by Orbax.

A folder holds `jaxserve.json` (the manifest), `weights/` (Orbax), config.json, generation_config.json and the
tokenizer's files. The manifest is written last, so that a folder without it is not taken for a whole checkpoint.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxserve.checkpoints.base import CheckpointError, list_names, read_json

MANIFEST = "jaxserve.json"
WEIGHTS = "weights"
FORMAT = 1


def is_engine_ready(path: Path) -> bool:
    """Whether the folder was written by `save_arrays`."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """What the checkpoint holds: `format`, `family`, `dtype`, `parameters` (name -> shape), `files` (name -> bytes).

    Raises:
        CheckpointError: no manifest, a damaged one, or one of another format version.
    """
    if not is_engine_ready(path):
        raise CheckpointError(f"{path} has no {MANIFEST}: it is not a complete checkpoint made by `jaxserve convert`")
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / MANIFEST} has format {manifest.get('format')!r}, not {FORMAT}; convert the model again"
        )
    fields = {"family": str, "dtype": str, "parameters": dict, "files": dict}
    if bad := [name for name, kind in fields.items() if not isinstance(manifest.get(name), kind)]:
        raise CheckpointError(f"{path / MANIFEST} lacks {', '.join(bad)}; convert the model again")
    return manifest


def save_arrays(path: Path, arrays: Mapping[str, jax.Array], *, family: str, dtype: str) -> None:
    """Write the parameters and, when they are complete, the manifest into an existing folder."""
    import orbax.checkpoint as ocp  # a second of import time that only this format needs

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((path / WEIGHTS).absolute(), dict(arrays))
        checkpointer.wait_until_finished()
    manifest = {
        "format": FORMAT,
        "family": family,
        "dtype": dtype,
        "parameters": {name: list(array.shape) for name, array in arrays.items()},
        "files": _file_sizes(path / WEIGHTS),
    }
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def restore_arrays(path: Path, abstract: Mapping[str, jax.ShapeDtypeStruct], *, family: str) -> dict[str, jax.Array]:
    """Read the parameters straight into the shardings of `abstract`, cast to its dtypes.

    Raises:
        CheckpointError: made for another family, other parameters or shapes than asked for, or incomplete.
    """
    manifest = read_manifest(path)
    if manifest["family"] != family:
        raise CheckpointError(
            f"{path} holds parameters of the family {manifest['family']!r}, but its config.json describes {family!r}; "
            "convert the model again"
        )
    stored = {name: tuple(shape) for name, shape in manifest["parameters"].items()}
    _check_parameters(path, stored, {name: struct.shape for name, struct in abstract.items()})
    _check_files(path / WEIGHTS, manifest["files"])
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore((path / WEIGHTS).absolute(), dict(abstract))
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path / WEIGHTS} is damaged ({reason}); convert the model again") from error


def _check_parameters(path: Path, stored: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> None:
    """Compare names and shapes before any data is read."""
    problems = []
    if missing := wanted.keys() - stored.keys():
        problems.append(f"lacks {list_names(missing)}")
    if extra := stored.keys() - wanted.keys():
        problems.append(f"also has {list_names(extra)}")
    for name in sorted(wanted.keys() & stored.keys()):
        if tuple(stored[name]) != tuple(wanted[name]):
            problems.append(f"has {name} with shape {list(stored[name])} where the model needs {list(wanted[name])}")
            break
    if problems:
        raise CheckpointError(f"{path} {' and '.join(problems)}; convert the model again with this version")


def _check_files(folder: Path, expected: Mapping[str, int]) -> None:
    """Find lost and shortened files first: Orbax would report the first tensor it stumbles over."""
    found = _file_sizes(folder)
    if lost := expected.keys() - found.keys():
        raise CheckpointError(f"{folder} is incomplete, it lacks {list_names(lost)}; convert the model again")
    for name, size in expected.items():
        if found[name] != size:
            raise CheckpointError(
                f"{folder / name} has {found[name]:,} bytes instead of {size:,}; copy it or convert the model again"
            )


def _file_sizes(folder: Path) -> dict[str, int]:
    """Relative path -> bytes of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
