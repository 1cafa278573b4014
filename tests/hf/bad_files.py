"""Bad model directories, a row each: how a good one is damaged, which error that is, and its reason.

A row is (damage(directory), error, regular expression of the reason), by group.  WHOLE rows start from a directory with one
file of weights, SHARDED ones from two and an index, TOKENIZER ones are met by `load_tokenizer`, VALUES ones only where weights are
read, which the doctor does not do.  To add a row, add a line: test_bad_files.py runs it through `hf.load` and the doctor.
"""

import json
import os
import pickle
import re
import socket
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from checkpoint_case import PLAIN, write
from safetensors.numpy import load_file, save_file

from jaxllm.errors import CheckpointError, ConfigError, TokenizerError
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


HEADERS = {
  "empty": (content(WEIGHTS, b""), "found 0 bytes, expected 8 and more"),
  "no header": (raw(b"", b"", 0), "found a header of 0 bytes, expected 2 to"),
  "cut in the header": (
    raw(length=10**6),
    r"found 1\d\d bytes, expected a header of 1,000,000: cut short.*; fetch the file again$",
  ),
  "a length of 2^64 - 1": (raw(length=2**64 - 1), "expected a header of 18,446,744,073,709,551,615"),
  "a length of 2^63": (raw(length=2**63), "expected a header of 9,223,372,036,854,775,808"),
  "cut in the data": (raw(data=bytes(20)), "expected 1[0-9]{2}: cut short, from a on"),
  "cut in the last tensor": (raw(data=bytes(24)), "cut short, from b on"),
  "more data": (raw(data=bytes(30)), "more than its tensors"),
  "no JSON": (raw(b"{]" * 9), "header: not JSON"),
  "not UTF-8": (raw(b'{"\xff": 1}'), "header: not JSON"),
  "a list": (raw(b"[1, 2]"), "header: found a list, expected an object"),
  "nested too deep": (raw(b"[" * 100_000), "header: not JSON"),
  "a type nested deep": (
    raw(b'{"a":{"dtype":' + b"[" * 900 + b"]" * 900 + b',"shape":[],"data_offsets":[0,0]}}'),
    "header|dtype",
  ),
  "a number of 5,000 digits": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "header: not JSON"),
  "NaN": (raw(b'{"a": NaN}'), "header: found NaN, expected finite numbers"),
  "1e999": (raw(b'{"a": 1e999}'), "header: found 1e999, expected finite numbers"),
  "a tensor twice": (raw(json.dumps(HEADER)[:-1].encode() + b', "a": 1}'), "header: found the key 'a' twice"),
  "metadata": (raw(HEADER | {"__metadata__": {"a": 1}}), "__metadata__ is not an object of texts"),
  "no shape": (raw(HEADER | {"a": {"dtype": "F32", "data_offsets": [0, 24]}}), "'a': expected dtype, shape"),
  "a fourth entry": (entry(more=1), "'a': expected dtype, shape, data_offsets and nothing else"),
  "a type": (entry(dtype="F31"), "'a': found dtype 'F31', expected one of F64, F32"),
  "a type of another kind": (entry(dtype=[4]), r"'a': found dtype \[4\]"),
  "a negative dimension": (entry(shape=[-2, -3]), r"'a': found shape \[-2, -3\]"),
  "a bool": (entry(shape=[True, 6]), r"'a': found shape \[True, 6\]"),
  "a fraction": (entry(shape=[2.0, 3]), "'a': found shape"),
  "a rank of 9": (entry(shape=[6, *[1] * 8]), "'a': found shape .* at most 8"),
  "2^40 + 1": (
    entry(shape=[2**40 + 1, 0], data_offsets=[0, 0]),
    "'a': found shape .*up to 1,099,511,627,776",
  ),
  "2^63": (entry(shape=[2**63, 0], data_offsets=[0, 0]), "'a': found shape"),
  "a product that overflows": (
    entry(shape=[2**33, 2**31, 3]),
    "'a': found 24 bytes, expected [0-9,]{20,} for F32",
  ),
  "offsets the wrong way": (entry(data_offsets=[24, 0]), r"'a': found data_offsets \[24, 0\]"),
  "three offsets": (entry(data_offsets=[0, 24, 24]), "'a': found data_offsets"),
  "offsets of 2^64": (entry(data_offsets=[2**64, 2**64 + 24]), "'a': found data_offsets"),
  "bytes that do not fit the shape": (entry(data_offsets=[0, 20]), "'a': found 20 bytes, expected 24"),
  "an overlap": (entry(data_offsets=[1, 25]), "overlaps the tensor before it|leaves 1 bytes"),
  "a gap": (
    raw(HEADER | {"b": HEADER["b"] | {"data_offsets": [25, 26]}}, bytes(26)),
    "b leaves 1 bytes unused",
  ),
  "a name of 513 bytes": (named("é" * 256 + "n"), "a name of 513 bytes, expected at most 512"),
  "a name that rewrites the terminal": (named("\x1b[2J"), "characters that do not print"),
  "a name of two lines": (named("a\nb"), "characters that do not print"),
  "half a character": (named("\ud800"), "characters that do not print"),
  "too many tensors": (
    many(200_001, b'{"dtype":"U8","shape":[],"data_offsets":[0,0]}'),
    'header: found 200,001 times "data_offsets", expected at most 200,000 tensors',
  ),
  "too many keys": (many(10**6 + 1, b"0"), "header: found 1,000,001 times :"),
  "too many numbers": (raw(b"[0" + b",0" * 4_000_000 + b"]", b""), "header: found 4,000,000 times ,"),
  "a header of more than 16 MiB": (
    raw(b"{" + b" " * (16 << 20) + b"}", b""),
    "found a header of 16,777,218 bytes, expected 2 to 16,777,216",
  ),
  "a zip archive": (
    instead(WEIGHTS, archive),
    "found a zip archive, as torch.save .* write: pickles run code",
  ),
  "a pickle": (
    content(WEIGHTS, PICKLE),
    "found a pickle, which runs code when it is read; expected a safetensors file",
  ),
  "an old pickle": (content(WEIGHTS, pickle.dumps(re.compile, 0)), "cut short, or no safetensors file"),
  "an array of NumPy": (content(WEIGHTS, b"\x93NUMPY\x01\x00v\x00{'descr'"), "found an array of NumPy"),
  "GGUF": (content(WEIGHTS, b"GGUF\x03\x00\x00\x00" + bytes(99)), "found a GGUF file"),
  "HDF5": (content(WEIGHTS, b"\x89HDF\r\n\x1a\n" + bytes(99)), "found an HDF5 file"),
  "a pointer of Git LFS": (
    content(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "found a pointer of Git LFS; fetch the file itself: git lfs pull",
  ),
  "a web page": (content(WEIGHTS, "<!DOCTYPE html><html>"), "found a web page"),
}

PICKLES = [
  "pytorch_model.bin",
  "model.pt",
  "consolidated.00.pth",
  "model.ckpt",
  "flax.pkl",
  "w.npz",
  "w.npy",
  "m.joblib",
]
PICKLES = {
  f"only {name}": (
    both(gone(WEIGHTS), content(name, PICKLE)),
    f"found {name}, expected model.safetensors: pickles run code .*save_pretrained",
  )
  for name in [*PICKLES, "m.pickle"]
}

WHOLE = {group: (damage, CheckpointError, reason) for group, (damage, reason) in (HEADERS | PICKLES).items()}
WHOLE |= {
  f"{name} is {what}": (instead(name, make), CheckpointError, f"{name}: {reason}")
  for name in (WEIGHTS, "config.json", "generation_config.json")
  for what, (make, reason) in SPECIAL.items()
  if (name, what) not in {("config.json", "a terabyte"), ("generation_config.json", "a terabyte")}
}
WHOLE |= {
  "no weights": (gone(WEIGHTS), CheckpointError, "no model.safetensors or model.safetensors.index.json"),
  "no config.json": (gone("config.json"), CheckpointError, "no config.json; give the directory"),
  "missing": (tensors(lambda t: t.pop(UP)), CheckpointError, rf"missing: {UP} \[80, 48\]"),
  "unexpected": (
    tensors(lambda t: t.update({"model.extra": t[UP]})),
    CheckpointError,
    r"unexpected: model.extra of model.safetensors \[80, 48\]",
  ),
  "transposed": (
    tensors(lambda t: t.update({UP: t[UP].T.copy()})),
    CheckpointError,
    rf"shape: {UP} of model.safetensors is \[48, 80\], expected \[80, 48\] \(hidden_size = 48, intermediate_size = 80\)",
  ),
  "shape of the vocabulary": (
    tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:60].copy()})),
    CheckpointError,
    r"is \[60, 48\], expected \[61, 48\] \(vocab_size = 61, hidden_size = 48\)",
  ),
  "shape of k": (
    tensors(lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": np.zeros((64, 48), np.float32)})),
    CheckpointError,
    r"is \[64, 48\], expected \[32, 48\] \(hidden_size = 48, num_key_value_heads = 2, head_dim = 16\)",
  ),
  "a layer less": (
    tensors(lambda t: [t.pop(name) for name in list(t) if ".2." in name]),
    CheckpointError,
    r"the files hold 2 layers, expected 3 \(num_hidden_layers = 3\).*missing: model.layers.2.mlp.up_proj.weight",
  ),
  "a layer more": (
    tensors(lambda t: t.update({name.replace(".2.", ".3."): x for name, x in t.items() if ".2." in name})),
    CheckpointError,
    r"the files hold 4 layers, expected 3 \(num_hidden_layers = 3\).*unexpected: model.layers.3.mlp.up_proj.weight",
  ),
  "no head": (
    tensors(lambda t: t.pop("lm_head.weight")),
    CheckpointError,
    r"missing: lm_head.weight \[61, 48\]",
  ),
  "another head beside a tied one": (
    settings(tie_word_embeddings=True),
    CheckpointError,
    "tied: lm_head.weight of .* is not model.embed_tokens.weight .*they differ first in row 0.*tie_word_embeddings",
  ),
  "a tied head of another type": (
    both(
      settings(tie_word_embeddings=True),
      tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].astype(np.float16)})),
    ),
    CheckpointError,
    "tied: lm_head.weight of model.safetensors is float16",
  ),
} | {
  f"a tensor of {kind}": (
    typed(UP, kind),
    CheckpointError,
    f"type: {UP} of model.safetensors is .*expected float32",
  )
  for kind in header.DTYPES
  if kind not in ("F32", "F16", "BF16")
}

BOM = b"\xef\xbb\xbf"
CONFIG_BYTES = {
  "empty": (b"", "not JSON"),
  "not JSON": (b"{a: 1}", "not JSON"),
  "not UTF-8": (b'{"a": "\xff"}', "not JSON"),
  "a byte order mark": (BOM + json.dumps(SETTINGS).encode(), "not JSON .*BOM"),
  "a list": (b"[1]", "a JSON list, expected an object"),
  "nested too deep": (b'{"a":' * 100_000, "not JSON"),
  "a number of 5,000 digits": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not JSON"),
  "NaN": (b'{"rms_norm_eps": NaN}', "found NaN, expected finite"),
  "Infinity": (b'{"rms_norm_eps": -Infinity}', "found -Infinity, expected finite"),
  "1e999": (b'{"rms_norm_eps": 1e999}', "found 1e999, expected finite"),
  "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
  "a key twice, a megabyte long": (b'{"%b": 1, "%b": 2}' % (2 * (b"k" * 10**6,)), "the key 'k{100}' twice"),
  "no object inside": (b"null", "a JSON NoneType, expected an object"),
}
WHOLE |= {
  f"config.json is {what}": (content("config.json", data), ConfigError, reason)
  for what, (data, reason) in CONFIG_BYTES.items()
}
WHOLE |= {
  f"{name} of a terabyte": (
    instead(name, sparse),
    ConfigError,
    f"{name}: found 1,099,511,627,776 bytes, expected at most 4,194,304",
  )
  for name in ("config.json", "generation_config.json")
}
HUGE = 2**31 - 1
LONG = "x" * 10**6
LINEAR = dict(rope_type="linear", factor=2.0)
CONFIGS = [
  ("no model_type", dict(model_type=None), "model_type: found null, expected a string"),
  (
    "a family nobody has",
    dict(model_type="lama"),
    r"model_type: found 'lama', expected one of .*\(nearest: llama\)",
  ),
  ("a text of a megabyte", dict(model_type=LONG), r"model_type: found 'x{30,40}\.\.\."),
  ("a key of a megabyte", {LONG: 1}, r"unknown settings.*'x{30,40}\.\.\..* = 1; expected some of"),
  ("a key that rewrites the terminal", {"\x1b[2J": 1}, r"unknown settings.*'\\x1b\[2J' = 1"),
  ("20,000 unknown keys", {f"hidden_sizes{i}": i for i in range(20_000)}, "and 19,980 more"),
  ("an activation nobody has", dict(hidden_act="sliu"), "hidden_act: found 'sliu', expected one of silu"),
  (
    "a rope nobody has",
    dict(rope_scaling=dict(rope_type="llama4")),
    "rope_type: found 'llama4'.*nearest: llama3",
  ),
  (
    "a key of rope nobody has",
    dict(rope_scaling=LINEAR | dict(betafast=3)),
    "rope_scaling.betafast = 3",
  ),
  ("rope twice", dict(rope_scaling=LINEAR, rope_parameters=LINEAR), "rope_scaling: .*beside rope_parameters"),
  ("true for a number", dict(num_hidden_layers=True), "num_hidden_layers: found true"),
  ("a number for true", dict(tie_word_embeddings=1), "tie_word_embeddings: found 1, expected true or false"),
  (
    "2^31",
    dict(hidden_size=2**31),
    "hidden_size: found 2147483648, expected an integer from 1 to 2147483647",
  ),
  ("10^400", dict(vocab_size=10**400), "vocab_size: found a number of very many digits"),
  ("a list, 300 deep", dict(hidden_size=json.loads("[" * 300 + "]" * 300)), r"hidden_size: found \[\[\["),
  (
    "quantized",
    dict(quantization_config=dict(quant_method="gptq")),
    "quantization_config: found .*quantized",
  ),
  (
    "heads that do not divide",
    dict(num_key_value_heads=3),
    "num_key_value_heads: found 3, expected a divisor",
  ),
  (
    "2^31 - 2 heads",
    dict(num_attention_heads=HUGE - 1),
    "num_attention_heads: found 2147483646, expected a divisor",
  ),
  ("heads of 2^31 - 2", dict(head_dim=HUGE - 1), "head_dim.*: found 2147483646, expected at most 65536"),
  (
    "heads of 2^28",
    dict(hidden_size=2**30, head_dim=None),
    "head_dim.*: found 268435456, expected at most 65536",
  ),
  (
    "10^9 layers",
    dict(num_hidden_layers=10**9),
    "num_hidden_layers: found 1000000000, expected an integer from 1 to",
  ),
  (
    "more parameters than any model",
    dict(hidden_size=2**30, intermediate_size=HUGE),
    r"asks for some 2\^62 parameters \(a vocabulary of 61, width 1,073,741,824, .*MLP 2,147,483,647\), beyond any model",
  ),
]
WHOLE |= {
  f"config.json: {what}": (settings(**changes), ConfigError, reason) for what, changes, reason in CONFIGS
}
LIES = [
  (
    "vocab_size",
    HUGE,
    "asks for some 103,079,245,008 parameters .*, and the files hold 68,400, most by vocab_size = 2147483647",
  ),
  ("hidden_size", 2**24, "asks for some .*most by hidden_size = 16777216"),
  ("head_dim", 2**16, "asks for some .*most by head_dim = 65536"),
  ("intermediate_size", HUGE, "asks for some .*most by intermediate_size = 2147483647"),
  ("num_hidden_layers", 9999, "says 9,999 layers, but the files hold 3"),
  ("num_hidden_layers", 999, "asks for some .*most by num_hidden_layers = 999"),
  ("num_hidden_layers", 4, r"files hold 3 layers, expected 4 \(num_hidden_layers = 4\)"),
]
WHOLE |= {
  f"config.json: {key} = {number}": (settings(**{key: number}), CheckpointError, reason)
  for key, number, reason in LIES
}
WHOLE |= {
  "generation_config.json: a text for a token": (
    settings("generation_config.json", eos_token_id="</s>"),
    ConfigError,
    "generation_config.json: eos_token_id: found '</s>', expected a token id",
  ),
  "generation_config.json is not JSON": (
    content("generation_config.json", "x"),
    ConfigError,
    "generation_config.json: not JSON",
  ),
}

NAMES = [
  *(
    "../x.safetensors",
    "/abs.safetensors",
    "a/x.safetensors",
    "a/../../x.safetensors",
    "..\\x.safetensors",
    "a\\x.safetensors",
  ),
  *(
    "C:x.safetensors",
    "C:\\x.safetensors",
    "\\\\host\\x.safetensors",
    "//host/x.safetensors",
    "./x.safetensors",
    "x.bin",
    "",
  ),
  *(
    ".",
    "..",
    "...",
    "/",
    "\\",
    "~",
    "~/x.safetensors",
    "~root/x.safetensors",
    "$HOME/x.safetensors",
    "%2e%2e/x.safetensors",
  ),
  *(
    3,
    None,
    True,
    1.5,
    [],
    ["x.safetensors"],
    {},
    {"a": 1},
    "x\0.safetensors",
    "x.safetensors\0",
    "\0",
    ".safetensors",
  ),
  *(
    "x.safetensors\n",
    "\nx.safetensors",
    " x.safetensors",
    "x.safetensors ",
    "x y.safetensors",
    "x.safetensors/",
    "x.SAFETENSORS",
  ),
  *(
    "http://x/y.safetensors",
    "file:///x.safetensors",
    "hf://o/n/x.safetensors",
    "n" * 300 + ".safetensors",
    "n" * 10_000,
  ),
  *(
    "\uff0e\uff0e/x.safetensors",
    "\uff0e\uff0e.safetensors",
    "\u2025/x.safetensors",
    "x\u2215y.safetensors",
    "x\u202e.safetensors",
  ),
  *(
    "é.safetensors",
    "-x.safetensors",
    ".x.safetensors",
    "..x.safetensors",
    "x.safetensors.bin",
    "config.json",
    "x.safetensors:stream",
  ),
  *(
    "CON:",
    "|id.safetensors",
    "x;id.safetensors",
    "`id`.safetensors",
    "/dev/zero",
    "/proc/self/environ",
    "../canary.safetensors",
  ),
]
"""What is no plain name of a file of weights."""

SHARDED = {
  f"{name} is {what}": (instead(name, make), CheckpointError, f"{name}: {reason}")
  for name in (INDEX, SHARD)
  for what, (make, reason) in SPECIAL.items()
  if (name, what) != (SHARD, "a link to nothing")
} | {
  "a shard is missing": (gone(SHARD), CheckpointError, rf"{SHARD}: no such file; it should hold \d+ tensors \(.*, \.\.\.\)"),
  "a shard is cut short": (cut(SHARD, 9), CheckpointError, rf"{SHARD}: found [0-9,]+ bytes, expected [0-9,]+: cut short, from model"),
  "a shard twice": (
    lambda directory: (directory / SHARD).write_bytes((directory / SHARD.replace("2-of", "1-of")).read_bytes()),
    CheckpointError,
    rf"{SHARD}: lacks .*, which the index has there.*{SHARD}: holds .*, which the index has in model-00001",
  ),
  "a tensor more than the index has": (moved(SHARD, UP, None), CheckpointError, f"holds {UP}, not in the index"),
  "a tensor elsewhere": (moved(SHARD, UP, "x.safetensors"), CheckpointError, "x.safetensors: no such file"),
  "an index of no tensors": (index({}), CheckpointError, f"{INDEX}: found no weight_map"),
  "an index that is a list": (index([]), CheckpointError, f"{INDEX}: found no weight_map"),
  "an index of nothing": (content(INDEX, "{}"), CheckpointError, f"{INDEX}: found no weight_map"),
  "an index that is not JSON": (content(INDEX, "x"), CheckpointError, f"{INDEX}: not JSON"),
  "an index with a tensor twice": (
    content(INDEX, '{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}'),
    CheckpointError,
    f"{INDEX}: found the key 'a' twice",
  ),
  "an index with a name that does not print": (index({"a\n": SHARD}), CheckpointError, "weight_map: 'a.n': .*do not print"),
} | {
  f"weight_map {i}": (index({"a": name}), CheckpointError, rf"{INDEX}: weight_map has 'a' in .*, expected the plain name")
  for i, name in enumerate(NAMES)
}  # fmt: skip

BF16 = ml_dtypes.bfloat16
VALUES = {
  "nan": (
    value(UP, (7, 5), np.nan),
    rf"{UP} of model.safetensors: 1 value is NaN or infinite, the first at \[7, 5\]: nan",
  ),
  "infinities": (
    both(value(UP, np.s_[70:, 3], -np.inf), value(UP, (79, 47), np.inf)),
    r"11 values are NaN or infinite, the first at \[70, 3\]: -inf",
  ),
  "nan of bfloat16": (
    tensors(lambda t: t.update({UP: np.full((80, 48), np.nan, BF16)})),
    rf"{UP} of model.safetensors: 3,840 values are NaN or infinite, the first at \[0, 0\]: nan",
  ),
  "infinity of float16": (
    tensors(lambda t: t.update({UP: np.full((80, 48), np.inf, np.float16)})),
    rf"{UP} of model.safetensors: 3,840 values",
  ),
}
VALUES = {name: (damage, CheckpointError, reason) for name, (damage, reason) in VALUES.items()}

TOKENIZER_JSON = "tokenizer.json"


def vocabulary(change):
  """Another tokenizer.json."""

  def damage(directory):
    plain = json.loads((directory / TOKENIZER_JSON).read_text())
    change(plain)
    (directory / TOKENIZER_JSON).write_text(json.dumps(plain))

  return damage


TOKENIZER = {
  f"{name} is {what}": (
    instead(name, make),
    TokenizerError if what == "a terabyte" else CheckpointError,
    f"{name}: {reason}",
  )
  for name in (TOKENIZER_JSON, "tokenizer_config.json")
  for what, (make, reason) in SPECIAL.items()
} | {
  f"tokenizer.json of {what}": (content(TOKENIZER_JSON, data), TokenizerError, "tokenizer.json: not a tokenizer")
  for what, data in (
    ("nothing", b""),
    ("an empty object", b"{}"),
    ("no UTF-8", b"\xff"),
    ("a number", b'{"model": 1}'),
    ("a pickle", PICKLE),
    ("lists, 100,000 deep", b"[" * 100_000),
    ("a model nobody has", b'{"version": "1.0", "model": {"type": "Banana"}}'),
  )
} | {
  "tokenizer_config.json is not JSON": (content("tokenizer_config.json", "x"), TokenizerError, "tokenizer_config.json: not JSON"),
  "tokenizer_config.json is a list": (content("tokenizer_config.json", "[]"), TokenizerError, "a JSON list, expected an object"),
  "a key of tokenizer_config.json twice": (content("tokenizer_config.json", '{"a": 1, "a": 2}'), TokenizerError, "the key 'a' twice"),
  "special_tokens_map.json is not JSON": (content("special_tokens_map.json", "x"), TokenizerError, "special_tokens_map.json: not JSON"),
  "more ids than embeddings": (
    vocabulary(lambda plain: plain["model"]["vocab"].update({"word": 61})),
    TokenizerError,
    "the tokenizer has ids up to 61, but the embedding of .* has 61 rows; take the tokenizer that the model was trained with",
  ),
  "an id of 2^32 - 1": (
    vocabulary(lambda plain: plain["model"]["vocab"].update({"word": 2**32 - 1})),
    TokenizerError,
    "the tokenizer has ids up to 4294967295, but the embedding",
  ),
  "an id below 0": (vocabulary(lambda plain: plain["model"]["vocab"].update({"word": -1})), TokenizerError, "not a tokenizer"),
  "no end token": (
    settings("tokenizer_config.json", eos_token="<end>"),
    TokenizerError,
    "eos_token = '<end>' of tokenizer_config.json .*: not in the vocabulary; take the files of one tokenizer",
  ),
  "neither first nor end token": (
    settings("tokenizer_config.json", bos_token={"content": "<a>"}, eos_token="<b>"),
    TokenizerError,
    "bos_token = '<a>' and eos_token = '<b>' of .*not in the vocabulary",
  ),
  "a template that is no text": (content("chat_template.jinja", b"\xff\xfe"), TokenizerError, "chat_template.jinja: not UTF-8"),
  "a template of a terabyte": (lambda directory: sparse(directory / "chat_template.jinja"), TokenizerError, "expected at most 4,194,304"),
}  # fmt: skip
