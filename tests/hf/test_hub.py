"""Where a checkpoint is: directories, the cache of the Hub, and what to do without a network or a package."""

import json
import subprocess
import sys

import pytest
from checkpoint_case import write

from jaxllm.errors import CheckpointError
from jaxllm.hf import files, hub, loading
from jaxllm.hf.files import Checkpoint

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
errors = pytest.importorskip("huggingface_hub.errors")
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A cache with one repository, as huggingface_hub lays it out: a snapshot of links into blobs; no network."""
  home = tmp_path / "hub" / "models--owner--tiny"
  snapshot = home / "snapshots" / REVISION
  write(tmp_path / "model")
  for folder in (snapshot, home / "refs", home / "blobs"):
    folder.mkdir(parents=True)
  (home / "refs" / "main").write_text(REVISION)
  for i, path in enumerate(sorted((tmp_path / "model").iterdir())):
    path.rename(home / "blobs" / str(i))
    (snapshot / path.name).symlink_to(f"../../blobs/{i}")
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  return snapshot


def test_a_directory_is_itself(tmp_path, monkeypatch):
  assert hub.find(tmp_path) == tmp_path
  (tmp_path / "owner" / "tiny").mkdir(parents=True)  # it comes before a repository of that name
  monkeypatch.chdir(tmp_path)
  assert str(hub.find("owner/tiny")) == "owner/tiny"


@pytest.mark.parametrize("name", ["owner/tiny", "owner/tiny@main", f"owner/tiny@{REVISION}"])
def test_a_repository_in_the_cache(cache, name):
  found = hub.find(name)
  assert found == cache
  assert "lm_head.weight" in Checkpoint(found).tensors  # through links into blobs


@pytest.mark.parametrize("name", ["owner/other", "owner/tiny@v2"])
def test_offline_says_what_to_do(cache, name):
  with pytest.raises(CheckpointError) as e:
    hub.find(name)
  repository, _, revision = name.partition("@")
  command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
  assert all(
    words in str(e.value) for words in (f"not in the cache {cache.parents[2]}", command, "cannot be reached")
  )


@pytest.mark.parametrize("lack", ["model.safetensors", "a shard"])
def test_weights_that_are_not_in_the_cache(cache, lack):
  """As after load_tokenizer, which fetches no weights: the settings are found, and the Hub cannot be asked for more."""
  (cache / "model.safetensors").unlink()
  if lack == "a shard":
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (cache / "model.safetensors.index.json").write_text(json.dumps(index))
    lack = "model-00001-of-00001.safetensors"
  with pytest.raises(CheckpointError) as e:
    loading.load("owner/tiny@main")
  assert all(
    words in str(e.value)
    for words in (
      f"owner/tiny@main: its weights ({lack})",
      "hf download owner/tiny --revision main",
      "network",
    )
  )
  assert hub.find("owner/tiny", weights=False) == cache


@pytest.mark.parametrize(
  "there, words",
  [
    (
      ["config.json", "pytorch_model.bin", "onnx/x.bin"],
      r"found pytorch_model.bin, expected .*'owner/tiny'.*'tiny-safe'",
    ),
    (["config.json", "unet/model.safetensors"], "the repository has no model.safetensors"),
    (["config.json", "model.safetensors"], "was not fetched; run `hf download owner/tiny`"),
  ],
)
def test_a_repository_without_safetensors(cache, monkeypatch, there, words):
  (cache / "model.safetensors").unlink()
  monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision: there)
  with pytest.raises(CheckpointError, match=f"owner/tiny: .*{words}"):
    hub.find("owner/tiny")


@pytest.mark.parametrize("weights", [True, False])
def test_only_these_files_are_asked_for(cache, monkeypatch, weights):
  """Of a repository with everything in it: no pickles, no code, nothing in folders, no weights twice."""
  asked = {}
  monkeypatch.setattr(
    huggingface_hub, "snapshot_download", lambda name, **kwargs: asked.update(kwargs) or str(cache)
  )
  hub.find("owner/tiny", weights=weights)
  files = [
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
    "merges.txt",
    "vocab.txt",
  ]
  files += [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
  ]
  others = [
    "pytorch_model.bin",
    "consolidated.safetensors",
    "original/model.safetensors",
    "onnx/config.json",
    "modeling.py",
  ]
  others += ["README.md", "model.gguf", "flax_model.msgpack", "training_args.bin", "tf_model.h5"]
  from huggingface_hub.utils import filter_repo_objects

  filtered = filter_repo_objects(
    files + others, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
  )
  assert list(filtered) == [name for name in files if weights or not name.endswith(".safetensors")]


@pytest.mark.parametrize(
  "error, words",
  [
    ("RepositoryNotFoundError", "hf auth login"),
    ("GatedRepoError", "asks for consent"),
    ("RevisionNotFoundError", "check the name"),
  ],
)
def test_what_the_hub_refuses(monkeypatch, error, words):
  kind = getattr(errors, error)

  def refuse(*args, **kwargs):
    raise type(
      error, (kind,), {"__init__": lambda self: None, "__str__": lambda self: "404 there\nand more"}
    )()

  monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
  with pytest.raises(CheckpointError, match=rf"owner/gone: .*{error}: 404 there\); .*{words}"):
    hub.find("owner/gone")


def test_neither_a_directory_nor_a_repository(tmp_path):
  for name in ("gone", "../gone", "/gone/x", "a/b/c", "owner/", "-x/y", "owner/name@", "owner/na me"):
    with pytest.raises(CheckpointError, match="no such directory, and not the owner/name"):
      hub.find(name)
  (tmp_path / "model.safetensors").write_text("")
  with pytest.raises(
    CheckpointError, match=f"a file, expected a directory; give the one it is in: {tmp_path}"
  ):
    hub.find(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", [None, 5, b"owner/tiny"])
def test_what_is_no_path(name):
  with pytest.raises(CheckpointError, match=f"path_or_repo: found {name!r}, expected a directory"):
    hub.find(name)


def test_names_that_no_shard_has_are_not_looked_for(tmp_path):
  """Too long for any disk, outside of the directory, and no names; what is wrong with them a load says."""
  (tmp_path / "x.safetensors").write_text("")
  (tmp_path / "model").mkdir()
  index = tmp_path / "model" / "model.safetensors.index.json"
  for odd in ("x" * 5000 + ".safetensors", "../y.safetensors", ["a"], 7):
    index.write_text(json.dumps({"weight_map": {"a": odd}}))
    assert files.missing_weights(index.parent) == []
  index.write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
  assert files.missing_weights(index.parent) == ["b.safetensors"]


def test_without_the_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(
    CheckpointError,
    match=r"owner/tiny: no such directory; .* install the extra `hub` \(pip install -e '\.\[hub\]'\)",
  ):
    hub.find("owner/tiny")


def test_the_package_is_imported_only_when_it_is_needed():
  """And importing jaxllm.hf takes none of what its parts take."""
  heavy = ["jax", "flax", "huggingface_hub", "tokenizers", "transformers", "jinja2"]
  code = f"import sys, jaxllm.hf; assert not set(sys.modules) & set({heavy})"
  code += f"; from jaxllm.hf import hub, tokenizer; assert not set(sys.modules) & set({heavy})"
  subprocess.run([sys.executable, "-c", code], check=True)
