"""No bad file gets in: each row of bad_files.py by `hf.load` and by the doctor, and what needs more than a row."""

import json
import logging
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bad_files
import damage
import numpy as np
import pytest
from bad_files import SHARD, WEIGHTS
from doctor_case import call
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from jaxllm import doctor, hf
from jaxllm.errors import CheckpointError
from jaxllm.hf import files, header, match

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Good directories, by the number of their files of weights."""
  root = tmp_path_factory.mktemp("good")
  return {shards: damage.good(root / str(shards), shards) for shards in (1, 2)}


@pytest.fixture
def copy(whole, tmp_path):
  """A good directory to be damaged."""
  return lambda shards=1: Path(shutil.copytree(whole[shards], tmp_path / "model"))


def refused(call, error, reason, directory):
  """That a call raises the error with the reason and, but for what is said of the memory, the path; within a second."""
  start = time.thread_time()
  with pytest.raises(error) as e:
    call(directory)
  seconds = time.thread_time() - start
  message = str(e.value)
  assert type(e.value) is error
  assert re.search(reason, message, re.DOTALL), message
  assert str(directory) in message and len(message) < 6000
  assert message.isprintable() or message.replace("\n", "").isprintable()
  assert seconds < 2, f"{seconds:.2f} s"  # of which reading the tokenizers' package is most
  return message


def doctors(directory, capfd):
  """(exit code, what it said on standard error) of the doctor, without its lines about the machine."""
  return call(f"--model={directory}"), capfd.readouterr().err


ROWS = [("whole", name) for name in bad_files.WHOLE] + [("sharded", name) for name in bad_files.SHARDED]
TABLES = {"whole": bad_files.WHOLE, "sharded": bad_files.SHARDED, "tokenizer": bad_files.TOKENIZER}


@pytest.mark.parametrize(("table", "name"), ROWS + [("tokenizer", name) for name in bad_files.TOKENIZER])
def test_bad_files(copy, monkeypatch, capfd, table, name):
  """The error, its reason, and from the doctor its exit code and the same message, without a traceback."""
  directory = copy(2 if table == "sharded" else 1)
  change, error, reason = TABLES[table][name]
  change(directory)
  load = hf.load_tokenizer if table == "tokenizer" else hf.load
  message = refused(load, error, reason, directory)
  monkeypatch.setattr(doctor, "machine_lines", lambda: ([], []))
  code, said = doctors(directory, capfd)
  assert (code, "Traceback" in said) == (error.exit_code, False), said
  # the doctor gives the model of config.json in place of its path
  assert said.rstrip("\n") == f"error: {message}" or (
    table == "tokenizer" and re.search(reason, said, re.DOTALL)
  )


@pytest.mark.parametrize("name", bad_files.VALUES)
def test_bad_values(copy, name):
  directory = copy()
  change, error, reason = bad_files.VALUES[name]
  change(directory)
  with pytest.raises(error, match=reason):
    hf.load(directory)


def test_the_doctor_as_a_program(copy):
  """One row by itself: 65, a line, no traceback, and nothing on standard output about the model."""
  directory = copy()
  bad_files.WHOLE["a zip archive"][0](directory)
  done = subprocess.run(
    [sys.executable, "-m", "jaxllm.doctor", f"--model={directory}"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 65 and "family" not in done.stdout
  assert re.fullmatch(rf"error: {directory}/{WEIGHTS}: found a zip archive.*\n", done.stderr)


PARTS = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{p}_proj" for p in "qkvo")]
PARTS += [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
KINDS = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
KINDS += [f"model.layers.2.{part}.weight" for part in PARTS]


def test_every_kind_of_tensor_of_another_shape_in_one_message(copy):
  directory = copy()
  damage.tensors(lambda t: [t.update({name: np.ones((3, 5), np.float32)}) for name in KINDS])(directory)
  with pytest.raises(CheckpointError) as e:
    hf.load(directory)
  lines = str(e.value).splitlines()[1:]
  assert len(lines) == len(KINDS) == 12
  for name in KINDS:
    (line,) = (line for line in lines if f" {name} of" in line)
    assert re.search(r"is \[3, 5\], expected \[\d+(, \d+)?\] \(.*hidden_size = 48.*\)$", line)


@pytest.mark.parametrize("name", KINDS)
def test_one_nan_in_every_kind_of_tensor(copy, name):
  directory, place = copy(), {}

  def change(stored):
    place["last"] = tuple(size - 1 for size in stored[name].shape)
    stored[name][place["last"]] = np.nan

  damage.tensors(change)(directory)
  with pytest.raises(CheckpointError) as e:
    hf.load(directory)
  assert f"{name} of {WEIGHTS}: 1 value is NaN or infinite, the first at {list(place['last'])}: nan" in str(
    e.value
  )


def test_what_is_finite_and_odd_is_a_warning(copy, caplog):
  """Once, by the names of the tensors; of biases and norms zeros are usual."""
  directory = copy()
  zero, large = "model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight"

  def change(stored):
    stored[zero][:] = 0
    stored[large][3, 4] = -12345
    stored["model.layers.1.input_layernorm.weight"][:] = 0

  damage.tensors(change)(directory)
  hf.load(directory)
  warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
  assert [line.removeprefix(f"{directory}: ").partition(";")[0] for line in warned] == [
    f"matrices of zeros only: {zero}",
    f"values beyond 10,000: {large} (up to 1.234e+04)",
  ]
  caplog.clear()
  hf.load(directory, dtype="bfloat16")
  assert "(up to 1.235e+04)" in caplog.text  # as it is rounded


def test_a_hundred_places_to_cut_a_file(copy):
  """A shard cut anywhere: the file, and but in its header the bytes and the tensor that is cut first."""
  directory = copy(2)
  whole = (directory / SHARD).read_bytes()
  tensors = sorted(header.read_header(directory / SHARD).values(), key=lambda tensor: tensor.start)
  for size in np.linspace(0, len(whole) - 1, 100, dtype=int):
    (directory / SHARD).write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=rf"{SHARD}: found {size:,} bytes, expected") as e:
      hf.load(directory)
    if size >= tensors[0].start:
      cut = next(tensor for tensor in tensors if tensor.stop > size)
      assert f"expected {len(whole):,}: cut short, from {cut.name} on" in str(e.value)


LIES = [name for name in bad_files.WHOLE if re.fullmatch("config.json: .*([0-9]{3,}|any model)", name)]


@pytest.mark.parametrize("name", LIES)
def test_lies_about_sizes_cost_nothing(copy, monkeypatch, name):
  """Refused within a tenth of a second, and before a model is traced."""
  directory = copy()
  change, error, _ = bad_files.WHOLE[name]
  change(directory)
  monkeypatch.setattr(match, "expected_shapes", None)
  best = min(seconds_of(lambda: refuse(error, directory)) for _ in range(3))
  assert best < 0.1, f"{best:.3f} s"


def refuse(error, directory):
  with pytest.raises(error):
    hf.load(directory)


def seconds_of(call):
  start = time.thread_time()
  call()
  return time.thread_time() - start


BOMBS = {
  "a million tensors": b"{%s}"
  % b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)),
  "as many as fit in 16 MiB": b"{%s}"
  % b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(275_000)),
  "keys of a letter": b"{%s}" % b",".join(b'"%d":0' % i for i in range(1_400_000)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_header_bombs_cost_nothing(tmp_path, monkeypatch, name):
  """Refused within a fifth of a second, and before the JSON is parsed."""
  path = tmp_path / WEIGHTS
  path.write_bytes(len(BOMBS[name]).to_bytes(8, "little") + BOMBS[name])
  monkeypatch.setattr(header, "parse_json", None)

  def refuse():
    with pytest.raises(CheckpointError, match=r"found a header of|header: found"):
      header.read_header(path)

  best = min(seconds_of(refuse) for _ in range(3))
  assert best < 0.2, f"{best:.3f} s"


OPENED = []
WATCHING = []


def opening(event, args):
  """An audit hook, which stays for the life of the process: what was opened while somebody watches."""
  if (
    WATCHING and event == "open" and not isinstance(args[0], int)
  ):  # a descriptor is of a file that was opened
    OPENED.append(str(args[0]))


sys.addaudithook(opening)


def never_outside(directory, shard):
  """That an index with such a name is refused, by the name or as there is no such file, and nothing outside is opened."""
  text = json.dumps({"weight_map": {"a": shard}})
  (directory / "model.safetensors.index.json").write_text(text)
  OPENED.clear()
  WATCHING.append(True)
  try:
    with pytest.raises(
      CheckpointError, match=r"expected the plain name|no such file|not a regular|cannot be read"
    ):
      files.Checkpoint(directory)
  finally:
    WATCHING.clear()
  assert [str(directory / "model.safetensors.index.json")] == OPENED


PIECES = [
  "..",
  ".",
  "/",
  "\\",
  "a",
  "x",
  "\0",
  "\n",
  "~",
  "%2e",
  "\uff0e",
  "é",
  " ",
  ":",
  "canary",
  "-",
  "model",
  "etc/passwd",
]
SHARDS = st.one_of(
  st.lists(st.sampled_from(PIECES), max_size=8).map(lambda parts: "".join(parts) + ".safetensors"),
  st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
  st.text(max_size=20).map(lambda text: text.encode(errors="replace").decode() + ".safetensors"),
  st.one_of(st.none(), st.booleans(), st.integers(), st.lists(st.text(max_size=3), max_size=3)),
)


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_no_name_of_a_shard_leads_out(tmp_path, count):
  inner = tmp_path / "inner"
  inner.mkdir()
  for place in (tmp_path, tmp_path.parent):
    (place / "canary.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")

  @examples(max_examples=count, deadline=None, derandomize=True, database=None)
  @given(SHARDS)
  def check(shard):
    never_outside(inner, shard)

  check()
  for shard in bad_files.NAMES:
    never_outside(inner, shard)


def test_nothing_of_a_file_is_ever_run(whole, tmp_path):
  """200 payloads, in a process that an audit hook watches; the payload itself works, and what lies beside is not opened."""
  import payloads

  made = payloads.make(tmp_path, whole[1], 200)
  what = {str(directory): text for directory, text in made}
  done = subprocess.run(
    [sys.executable, str(Path(__file__).with_name("audited.py")), str(whole[1]), *what],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert not (tmp_path / "canary").exists()
  found = json.loads(done.stdout)
  assert found.keys() == what.keys()
  for directory, (model, tokenizer) in found.items():
    text = what[directory]
    loads = (
      "beside" in text or "code by" in text or "tokenizer" in text or text.startswith(("special", "chat"))
    )
    reads = not text.startswith(("tokenizer", "special")) and not (
      text.startswith("config") or text.startswith("chat")
    )
    assert (model == "ok") == loads, (text, model)
    assert (tokenizer == "ok") == reads or text.startswith("chat"), (text, tokenizer)
  live, arguments = payloads.calls(str(tmp_path / "canary"))[0]
  live(*arguments)
  assert (tmp_path / "canary").exists()


WATCHED = {
  "pickle.find_class": "import pickle; pickle.loads(pickle.dumps(print))",
  "exec": "exec((lambda: 0).__code__)",
  "compile": "compile('1', 'x', 'exec')",
  "os.system": "import os; os.system('true')",
  "subprocess.Popen": "import subprocess; subprocess.run(['true'])",
  "socket.connect": "import socket; socket.socket().connect(('127.0.0.1', 9))",
  "open": "open('/etc/hostname')",
}


def test_the_hook_sees_it():
  """Each of what may not happen, in a process that is forked for it, so that its absence says something."""
  done = subprocess.run(
    [sys.executable, "-c", f"import audited; audited.controls({WATCHED!r})"],
    capture_output=True,
    text=True,
    check=True,
    cwd=Path(__file__).parent,
  )
  assert [line.split()[0] for line in done.stderr.splitlines()] == list(WATCHED)
  assert json.loads(done.stdout) == [99] * len(WATCHED)


def test_code_of_a_model_is_named_once(copy, caplog):
  directory = copy()
  damage.settings(auto_map={"AutoModel": "x.Y"}, trust_remote_code=True)(directory)
  hf.load(directory)
  assert caplog.text.count("names code of its own (auto_map, trust_remote_code), which is never run") == 1
  caplog.clear()
  damage.settings("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})(directory)
  hf.load_tokenizer(directory)
  assert caplog.text.count("names code of its own (auto_map), which is never run") == 1


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "generation_config.json", "tokenizer.json"])
def test_links_into_the_directory_or_the_cache_are_followed(whole, tmp_path, name):
  """As the hub's cache has them; the blobs of another repository are elsewhere."""
  home = tmp_path / "hub" / "models--owner--tiny"
  directory = Path(shutil.copytree(whole[1], home / "snapshots" / "abc"))
  for blobs in (directory / "inner", home / "blobs", tmp_path / "hub" / "models--owner--other" / "blobs"):
    blobs.mkdir(parents=True)
    shutil.move((directory / name).resolve(), blobs / "1")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(blobs / "1")
    if "other" in str(blobs):
      with pytest.raises(CheckpointError, match=rf"{name}: a link to .*outside of the model's directory"):
        (hf.load_tokenizer if name.startswith("tokenizer") else hf.load)(directory)
    else:
      hf.load(directory)
      hf.load_tokenizer(directory)


def test_fewer_ids_than_embeddings_are_fine_and_said(copy, caplog, capfd, monkeypatch):
  directory = copy()
  with caplog.at_level("INFO", logger="jaxllm"):
    assert hf.load_tokenizer(directory).vocab_size == 5
  assert "56 rows of the embedding of" in caplog.text and "padding, which is fine" in caplog.text
  monkeypatch.setattr(doctor, "machine_lines", lambda: ([], []))
  assert call(f"--model={directory}", "--context=8") == 0
  assert "tokenizer: 5 ids, 56 rows of the embedding without one" in capfd.readouterr().out


def test_a_file_that_shrinks_while_it_is_read(copy):
  """Of the mapped file, what is gone would end the process."""
  directory = copy()
  checkpoint = files.Checkpoint(directory)
  damage.cut(WEIGHTS, 20_000)(directory)
  with pytest.raises(CheckpointError, match=r"the file was cut short while it was read"):
    checkpoint.view(max(checkpoint.tensors.values(), key=lambda tensor: tensor.stop).name)
