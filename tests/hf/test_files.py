"""Model directories read strictly: what safetensors writes is read, and what it would not is refused with the reason."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from checkpoint_case import write
from safetensors.numpy import save_file

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.hf import files
from jaxllm.hf.files import Checkpoint, parse_json, plain_file, read_header

HEADER = {
  "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
  "b": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]},
}


def raw(path, header=HEADER, data=bytes(25), length=None):
  """A file of this header (an object, or its bytes) and data."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
  return path


def altered(**kwargs):
  """HEADER with another entry for a."""
  return HEADER | {"a": HEADER["a"] | kwargs}


@pytest.mark.core
def test_views_of_what_safetensors_wrote(tmp_path):
  """Of every type, empty and scalar ones too, without a copy and read-only."""
  rng = np.random.default_rng(0)
  kinds = [
    kind
    for kind in files.DTYPES.values()
    if kind.name not in ("float8_e8m0fnu", "float8_e4m3fn", "float8_e5m2")
  ]
  stored = {f"t{i}": rng.integers(0, 2, (i, 3)).astype(kind) for i, kind in enumerate(kinds)}
  stored |= {
    "scalar": np.array(2.5, np.float32),
    "bf16": rng.standard_normal((5, 7)).astype(ml_dtypes.bfloat16),
  }
  save_file(stored, tmp_path / "model.safetensors")
  checkpoint = Checkpoint(tmp_path)
  assert checkpoint.tensors.keys() == stored.keys()
  for name, x in stored.items():
    view = checkpoint.view(name)
    assert view.dtype == x.dtype and view.shape == x.shape and view.tobytes() == x.tobytes()
    assert not view.flags.writeable or not view.size
    assert not view.flags.owndata or not view.size


BROKEN = {
  "empty": (dict(header=b"", data=b"", length=0), "found a header of 0 bytes|cut short"),
  "cut in the header": (
    dict(length=10**6),
    r"found 1\d\d bytes, expected a header of 1,000,000: cut short.*; fetch the file again$",
  ),
  "a length of 2^64 - 1": (dict(length=2**64 - 1), "expected a header of 18,446,744,073,709,551,615"),
  "cut in the data": (dict(data=bytes(20)), "expected 1[0-9]{2}: cut short, from a on"),
  "cut in the last tensor": (dict(data=bytes(24)), "cut short, from b on"),
  "more data": (dict(data=bytes(30)), "more than its tensors"),
  "no JSON": (dict(header=b"{]" * 9), "header: not JSON"),
  "not UTF-8": (dict(header=b'{"\xff": 1}'), "header: not JSON"),
  "a list": (dict(header=b"[1, 2]"), "header: expected an object"),
  "nested too deep": (dict(header=b"[" * 100_000), "header: not JSON"),
  "a number of 5,000 digits": (dict(header=b'{"a": ' + b"9" * 5000 + b"}"), "header: not JSON"),
  "NaN": (dict(header=b'{"a": NaN}'), "header: found NaN, expected finite numbers"),
  "a tensor twice": (
    dict(header=json.dumps(HEADER)[:-1].encode() + b', "a": 1}'),
    "header: found the key 'a' twice",
  ),
  "metadata": (dict(header=HEADER | {"__metadata__": {"a": 1}}), "__metadata__ is not an object of texts"),
  "no shape": (
    dict(header=HEADER | {"a": {"dtype": "F32", "data_offsets": [0, 24]}}),
    "'a': expected dtype, shape",
  ),
  "a fourth entry": (
    dict(header=altered(more=1)),
    "'a': expected dtype, shape, data_offsets and nothing else",
  ),
  "a type": (dict(header=altered(dtype="F31")), "'a': found dtype 'F31', expected one of F64, F32"),
  "a type of another kind": (dict(header=altered(dtype=[4])), r"'a': found dtype '\[4\]'"),
  "a negative dimension": (dict(header=altered(shape=[-2, -3])), r"'a': found shape \[-2, -3\]"),
  "a bool": (dict(header=altered(shape=[True, 6])), r"'a': found shape \[True, 6\]"),
  "a fraction": (dict(header=altered(shape=[2.0, 3])), "'a': found shape"),
  "a rank of 9": (dict(header=altered(shape=[6, *[1] * 8])), "'a': found shape .* at most 8"),
  "2^63": (dict(header=altered(shape=[2**63, 0], data_offsets=[0, 0])), "'a': found shape"),
  "a product that overflows": (
    dict(header=altered(shape=[2**33, 2**31, 3])),
    "'a': found 24 bytes, expected [0-9,]{20,} for F32",
  ),
  "offsets the wrong way": (dict(header=altered(data_offsets=[24, 0])), r"'a': found data_offsets \[24, 0\]"),
  "three offsets": (dict(header=altered(data_offsets=[0, 24, 24])), "'a': found data_offsets"),
  "bytes that do not fit the shape": (
    dict(header=altered(data_offsets=[0, 20])),
    "'a': found 20 bytes, expected 24",
  ),
  "an overlap": (dict(header=altered(data_offsets=[1, 25])), "overlaps the tensor before it|leaves 1 bytes"),
  "a gap": (
    dict(header=HEADER | {"b": HEADER["b"] | {"data_offsets": [25, 26]}}, data=bytes(26)),
    "b leaves 1 bytes unused",
  ),
  "a long name": (dict(header=HEADER | {"n" * 513: HEADER["b"]}), "a name of 513 characters"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path, case):
  """The reason, and the file, of each."""
  kwargs, reason = BROKEN[case]
  with pytest.raises(CheckpointError, match=reason) as e:
    read_header(raw(tmp_path / "model.safetensors", **kwargs))
  assert str(tmp_path / "model.safetensors") in str(e.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
  whole = raw(tmp_path / "whole").read_bytes()
  assert read_header(tmp_path / "whole")["a"].start == len(whole) - 25
  for n in range(len(whole)):
    (tmp_path / "cut").write_bytes(whole[:n])
    with pytest.raises(CheckpointError, match=r"cut short|found a header of 0"):
      read_header(tmp_path / "cut")


def test_a_large_header_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "parse_json", None)
  with open(tmp_path / "model.safetensors", "wb") as file:
    file.write((files.HEADER_LIMIT + 1).to_bytes(8, "little"))
    file.truncate(2 * files.HEADER_LIMIT)
  with pytest.raises(CheckpointError, match="found a header of 16,777,217 bytes, expected 2 to 16,777,216"):
    read_header(tmp_path / "model.safetensors")


def index(directory, weight_map):
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


NAMES = [
  "../x.safetensors",
  "/abs.safetensors",
  "a/x.safetensors",
  "..\\x.safetensors",
  "C:x.safetensors",
  "x.bin",
  "",
]
NAMES += [".", "..", 3, None, "x\0.safetensors", ".safetensors", "x.safetensors\n", "http://x/y.safetensors"]
NAMES += ["n" * 300 + ".safetensors", "\uff0e\uff0e.safetensors"]


@pytest.mark.parametrize("shard", NAMES)
def test_an_index_names_plain_files_only(tmp_path, shard):
  index(tmp_path, {"a": shard})
  with pytest.raises(CheckpointError, match=r"weight_map has 'a' in .*expected the plain name") as e:
    Checkpoint(tmp_path)
  assert "model.safetensors.index.json" in str(e.value)


def test_shards_that_disagree_with_the_index_are_named_in_one_message(tmp_path):
  one = np.ones(2, np.float32)
  save_file({"a": one, "b": one, "extra": one}, tmp_path / "one.safetensors")
  save_file({"b": one, "c": one}, tmp_path / "two.safetensors")
  index(
    tmp_path,
    dict(
      a="one.safetensors", b="one.safetensors", c="two.safetensors", d="two.safetensors", e="gone.safetensors"
    ),
  )
  with pytest.raises(CheckpointError) as e:
    Checkpoint(tmp_path)
  assert [line.strip() for line in str(e.value).splitlines()[1:]] == [
    "one.safetensors: holds extra, not in the index",
    "two.safetensors: lacks d, which the index has there",
    "two.safetensors: holds b, which the index has in one.safetensors",
    "gone.safetensors: no such file; it should hold 1 tensors (e)",
  ]


@pytest.mark.parametrize("plain", [[], {}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_map(tmp_path, plain):
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(plain))
  with pytest.raises(CheckpointError, match=r"no weight_map|expected an object"):
    Checkpoint(tmp_path)


@pytest.mark.parametrize(
  "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "flax.pkl"]
)
def test_pickles_are_not_read(tmp_path, name):
  (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
  with pytest.raises(
    CheckpointError, match=f"found {name}, expected model.safetensors: pickles run code .*save_pretrained"
  ):
    Checkpoint(tmp_path)


def test_a_directory_without_a_model(tmp_path):
  with pytest.raises(CheckpointError, match=r"no model.safetensors or model.safetensors.index.json"):
    Checkpoint(tmp_path)
  with pytest.raises(CheckpointError, match="no such directory"):
    Checkpoint(tmp_path / "none")


def test_what_is_no_regular_file_is_not_opened(tmp_path):
  os.mkfifo(tmp_path / "fifo")  # reading it would wait for ever
  (tmp_path / "folder").mkdir()
  (tmp_path / "device").symlink_to("/dev/zero")
  for name in ("fifo", "folder", "device"):
    with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
      plain_file(tmp_path, name)
  (tmp_path / "loop").symlink_to("loop")
  for name in ("loop", "none"):
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
      plain_file(tmp_path, name)


def test_links_stay_inside(tmp_path):
  """In the directory, or from a snapshot of a hub cache to the blobs of its own repository."""
  home = tmp_path / "models--owner--name" / "snapshots" / "abc"
  blobs = tmp_path / "models--owner--name" / "blobs"
  for folder in (home, blobs, tmp_path / "else"):
    folder.mkdir(parents=True)
    (folder / "file").write_text("{}")
  for target, allowed in ((home, True), (blobs, True), (tmp_path / "else", False)):
    (home / "link").unlink(missing_ok=True)
    (home / "link").symlink_to(target / "file")
    if allowed:
      assert plain_file(home, "link").read_text() == "{}"
    else:
      with pytest.raises(CheckpointError, match=r"a link to .*outside of the model's directory"):
        plain_file(home, "link")
  (tmp_path / "else" / "link").symlink_to(blobs / "file")
  with pytest.raises(CheckpointError, match="outside"):  # no snapshot
    plain_file(tmp_path / "else", "link")


def test_one_file_comes_before_an_index(tmp_path):
  """As transformers has it; the index beside it is not read."""
  write(tmp_path)
  index(tmp_path, {"a": "gone.safetensors"})
  assert "lm_head.weight" in Checkpoint(tmp_path).tensors


@pytest.mark.parametrize(
  "text, reason",
  [
    (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
    (b'{"a": Infinity}', "found Infinity"),
    (b'{"a": -Infinity}', "found -Infinity"),
    (b"\xef\xbb\xbf{}", "not JSON"),
    (b"", "not JSON"),
    (b'{"a": 1} 2', "not JSON"),
  ],
)
def test_strict_json(text, reason):
  with pytest.raises(ConfigError, match=reason) as e:
    parse_json(text, "here/config.json", ConfigError)
  assert str(e.value).startswith("here/config.json: ")


def test_json_files(tmp_path, monkeypatch):
  (tmp_path / "a.json").write_text('{"ä": [1, 2.5, true, null]}')
  assert files.read_json(tmp_path / "a.json", ConfigError) == {"ä": [1, 2.5, True, None]}
  monkeypatch.setattr(files, "JSON_LIMIT", 10)
  with pytest.raises(ConfigError, match="expected at most 10"):
    files.read_json(tmp_path / "a.json", ConfigError)
  (tmp_path / "a.json").write_text("[1]")
  with pytest.raises(ConfigError, match="a JSON list, expected an object"):
    files.read_json(tmp_path / "a.json", ConfigError)
