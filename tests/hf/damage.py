"""A good model directory, and ways to damage one: functions of the directory, which the tables of bad files are made of."""

import json
import os
import pickle
import re
import socket
import zipfile
from pathlib import Path

import numpy as np
from checkpoint_case import PLAIN, write
from safetensors.numpy import load_file, save_file

from jaxllm.hf import header

SETTINGS = PLAIN | dict(
  model_type="llama",
  architectures=["LlamaForCausalLM"],
  rms_norm_eps=1e-6,
  max_position_embeddings=64,
  hidden_act="silu",
  eos_token_id=2,
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00002-of-00002.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


def good(directory, shards=1):
  """A Llama with a tokenizer, which loads."""
  write(directory, shards=shards)
  (directory / "config.json").write_text(json.dumps(SETTINGS))
  (directory / "generation_config.json").write_text('{"eos_token_id": [2]}')
  vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "hello", "world"])}
  added = [
    dict(id=i, content=word, special=True)
    | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for word, i in list(vocab.items())[:3]
  ]
  model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
  plain = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Whitespace"}, "model": model}
  (directory / "tokenizer.json").write_text(json.dumps(plain))
  (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
  return directory


HEADER = {
  "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
  "b": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]},
}


def raw(header=HEADER, data=bytes(25), length=None, name=WEIGHTS):
  """Weights of this header (an object, or its bytes) and data."""

  def damage(directory):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (directory / name).write_bytes(size.to_bytes(8, "little") + text + data)

  return damage


def entry(**kwargs):
  """Weights whose first tensor is another one."""
  return raw(HEADER | {"a": HEADER["a"] | kwargs})


def named(name):
  """Weights with one more tensor of no bytes."""
  return raw(HEADER | {name: {"dtype": "U8", "shape": [0], "data_offsets": [25, 25]}})


def content(name, data):
  """A file of these bytes, or of this text."""
  return lambda directory: (directory / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def cut(name, size):
  """A file without its last bytes."""
  return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:-size])


def gone(*names):
  """Without these files."""

  def damage(directory):
    for name in names:
      (directory / name).unlink()

  return damage


def both(*damages):
  """One after the other."""
  return lambda directory: [damage(directory) for damage in damages]


def settings(name="config.json", **changes):
  """Other settings in a JSON file."""

  def damage(directory):
    (directory / name).write_text(json.dumps(json.loads((directory / name).read_text()) | changes))

  return damage


def tensors(change, name=WEIGHTS):
  """Other tensors in a file of weights."""

  def damage(directory):
    stored = {key: x.copy() for key, x in load_file(directory / name).items()}
    change(stored)
    save_file(stored, directory / name)

  return damage


def value(name, index, number):
  """Another value in a tensor."""
  return tensors(lambda stored: stored[name].__setitem__(index, number))


def typed(name, kind):
  """A tensor of another type, by its name in the header: the bytes are zeros."""

  def damage(directory):
    data = (directory / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    plain = json.loads(data[8 : 8 + size])
    values = {
      key: data[8 + size :][slice(*each["data_offsets"])] for key, each in plain.items() if key[0] != "_"
    }
    count = int(np.prod(plain[name]["shape"]))
    values[name] = bytes(count * header.DTYPES[kind].itemsize)
    plain[name]["dtype"], place = kind, 0
    for key, each in values.items():
      plain[key]["data_offsets"] = [place, place := place + len(each)]
    text = json.dumps(plain).encode()
    (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(values.values()))

  return damage


def many(count, entry, extra=b""):
  """A header of so many tensors."""
  text = b"{" + b",".join(b'"%d":' % i + entry for i in range(count)) + extra + b"}"
  return raw(text, b"")


def index(weight_map, **more):
  """Another weight_map."""
  return content(INDEX, json.dumps({"weight_map": weight_map} | more))


def moved(name, tensor, where):
  """An index that has a tensor elsewhere."""

  def damage(directory):
    plain = json.loads((directory / INDEX).read_text())
    plain["weight_map"][tensor] = where
    if where is None:
      del plain["weight_map"][tensor]
    (directory / INDEX).write_text(json.dumps(plain))

  return damage


def instead(name, make):
  """Something that is no regular file in place of a file."""

  def damage(directory):
    (directory / name).unlink()
    make(directory / name)

  return damage


def unix_socket(path):
  """A socket, bound by a short name, as paths of sockets are short."""
  here = os.getcwd()
  with socket.socket(socket.AF_UNIX) as one:
    os.chdir(path.parent)
    try:
      one.bind(path.name)
    finally:
      os.chdir(here)


def outside(path):
  """A link to the same bytes elsewhere."""
  target = path.parent.parent / f"elsewhere-{path.name}"
  target.write_bytes(b"{}")
  path.symlink_to(target)


def sparse(path):
  """A terabyte of zeros, which takes no room."""
  with open(path, "wb") as file:
    file.truncate(1 << 40)


SPECIAL = {
  "a fifo": (os.mkfifo, "not a regular file"),
  "a socket": (unix_socket, "not a regular file"),
  "a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
  "a directory": (Path.mkdir, "not a regular file"),
  "a link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
  "a link to nothing": (lambda path: path.symlink_to("nothing"), "cannot be read"),
  "a link outside": (outside, "a link to .*outside of the model's directory"),
  "a terabyte": (sparse, "found 1,099,511,627,776 bytes|found a header of 0 bytes"),
}

PICKLE = pickle.dumps(re.compile)  # of any global


def archive(path):
  """A zip archive as torch.save makes it, of a pickle; all but empty, and a gigabyte once it is unpacked."""
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
    file.writestr("archive/data.pkl", PICKLE)
    file.writestr("archive/data/0", bytes(1 << 24))
