"""What a name means: a folder here, or a model in huggingface_hub's cache; never the network."""

import builtins
import json

import pytest

from moestro.checkpoints.hub import check_kind, find_checkpoint, find_model, find_settings
from moestro.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function: files → the folder of `org/tiny` in huggingface_hub's cache; it is offline."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def make(**files):
        home = tmp_path / "cache" / "models--org--tiny"
        snapshot = home / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (home / "refs").mkdir()
        (home / "blobs").mkdir()
        (home / "refs" / "main").write_text(COMMIT)
        for number, (name, text) in enumerate(files.items()):
            blob = home / "blobs" / f"{number:040x}"
            blob.write_text(text)
            (snapshot / name.replace("_", ".")).symlink_to(f"../../blobs/{blob.name}")
        return snapshot

    return make


def test_a_remote_name_is_found_in_the_cache(cache):
    snapshot = cache(config_json=json.dumps({"model_type": "mixtral"}), model_safetensors="")
    assert find_model("org/tiny").samefile(snapshot)
    assert find_checkpoint("org/tiny").samefile(snapshot)


def test_what_is_here_comes_first(cache, tmp_path):
    cache(model_safetensors="")
    here = tmp_path / "org" / "tiny"
    here.mkdir(parents=True)
    assert find_model("org/tiny") == here.relative_to(tmp_path)
    assert find_model(here) == here


def test_a_folder_of_the_organisations_name_hides_no_cached_model(cache, tmp_path, monkeypatch):
    """And a path that is misspelt is asked of nobody else."""
    import huggingface_hub
    import huggingface_hub.constants

    snapshot = cache(model_safetensors="")
    (tmp_path / "org").mkdir()
    assert find_model("org/tiny").samefile(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    asked, real = [], huggingface_hub.snapshot_download

    def noted(name, **options):
        asked.append(options["local_files_only"])
        return real(name, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", noted)
    message = r"org/other is neither in the folder org nor in .* cache; .* hf download org/other"
    with pytest.raises(CheckpointError, match=message):
        find_model("org/other")
    assert asked == [True]


def test_settings_alone_need_no_weights(cache):
    snapshot = cache(config_json="{}")
    assert find_settings("org/tiny").samefile(snapshot / "config.json")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        find_model("org/tiny")
    (snapshot / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"org/tiny has no config\.json"):
        find_settings("org/tiny")


def gguf(folder):
    (folder / "q4.gguf").write_bytes(b"GGUF")


def adapter(folder):
    base = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(base))
    (folder / "adapter_model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (gguf, r"q4\.gguf is truncated or altered"),
        (adapter, r"is an adapter for org/base.* AutoPeftModelForCausalLM.*merge_and_unload"),
    ],
)
def test_other_programs_models_are_named(make, words, tmp_path):
    make(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        find_checkpoint(tmp_path)
    for path in tmp_path.glob("*.gguf"):
        with pytest.raises(CheckpointError, match=words):
            find_checkpoint(path)
    # Beside a whole model, or in a run's folder, such files are nobody's business.
    (tmp_path / "checkpoints").mkdir()
    check_kind(tmp_path)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "model.safetensors").touch()
    check_kind(tmp_path)


@pytest.mark.parametrize("name", ["tiny", "./org/tiny", "../org", "a/b/c", "/nowhere/x", "-/x", ""])
def test_other_names_never_reach_the_hub(cache, name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    if name == "":
        assert find_model(name).is_dir()  # the current folder
        return
    with pytest.raises(CheckpointError, match="does not exist"):
        find_model(name)


def test_offline_and_not_in_the_cache(cache):
    with pytest.raises(CheckpointError, match=r"org/none is no folder here.*cannot be reached"):
        find_model("org/none")


def test_pickles_alone_are_refused(cache):
    cache(config_json="{}", pytorch__model_bin="")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        find_model("org/tiny")


def test_without_the_extra_it_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CheckpointError, match=r"pip install 'moestro\[hf\]'"):
        find_model("org/tiny")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "neither a folder here nor a model"),
        ("GatedRepoError", "accept its terms"),
        ("HfHubHTTPError", "cannot fetch org/tiny: broken"),
        ("LocalEntryNotFoundError", "cannot be reached"),
    ],
)
def test_what_the_hub_answers(cache, monkeypatch, kind, message):
    import huggingface_hub.errors
    from huggingface_hub.utils import filter_repo_objects

    error = getattr(huggingface_hub.errors, kind)
    asked = {}

    def answer(name, **options):
        asked.update(options, name=name)
        failed = error.__new__(error, "broken")
        failed.args = ("broken",)
        raise failed

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    with pytest.raises(CheckpointError, match=message):
        find_model("org/tiny")
    kept = filter_repo_objects(
        [
            "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
            "tokenizer.json", "chat_template.jinja", "additional_chat_templates/rag.jinja",
            "tokenizer.model", "pytorch_model.bin", "original/model.safetensors", "README.md",
            "consolidated-00001.safetensors", "modeling_own.py", "original/config.json",
            "tiktoken.model", "original/tokenizer.model",
        ],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )  # fmt: skip
    assert list(kept) == [
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
        "tokenizer.json", "chat_template.jinja", "additional_chat_templates/rag.jinja",
        "tokenizer.model", "tiktoken.model",
    ]  # fmt: skip
