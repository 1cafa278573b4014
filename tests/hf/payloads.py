"""Ways to have code run by whoever reads a model directory: pickles and modules, by what they call and where they lie."""

import io
import itertools
import json
import os
import pickle
import shutil
import socket
import subprocess
import zipfile

from damage import INDEX, SETTINGS, WEIGHTS

PROTOCOLS = range(6)


def calls(canary):
  """(callable, arguments) that leave the file `canary`, or try to reach somebody."""
  return [
    (os.system, (f"touch {canary}",)),
    (subprocess.Popen, (["touch", canary],)),
    (exec, (f"open({canary!r}, 'w')",)),
    (eval, (f"open({canary!r}, 'w')",)),
    (open, (canary, "w")),
    (socket.create_connection, (("127.0.0.1", 9), 0.01)),
    (shutil.copy, ("/etc/hostname", canary)),
  ]


class Call:
  """What calls something when it is unpickled."""

  def __init__(self, call, arguments):
    self.reduced = call, arguments

  def __reduce__(self):
    return self.reduced


def archive(data, name="archive/data.pkl"):
  """A zip archive with a pickle, as torch.save and numpy.savez make them."""
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
    file.writestr(name, data)
  return out.getvalue()


def array(data):
  """An .npy file of objects."""
  text = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
  return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def module(data):
  """A module that unpickles."""
  return b"import pickle\npickle.loads(%r)\n" % data


def header(data):
  """A safetensors file whose metadata is a pickle."""
  text = json.dumps({"__metadata__": {"pickle": data.hex()}}).encode()
  return len(text).to_bytes(8, "little") + text


WRAPPED = {
  "raw": lambda data: data,
  "zip": archive,
  "npy": array,
  "npz": lambda data: archive(array(data), "a.npy"),
}
ALONE = [
  "pytorch_model.bin",
  "model.pt",
  "consolidated.00.pth",
  "model.ckpt",
  "flax_model.pkl",
  "model.npz",
  "model.npy",
]
BESIDE = [
  "training_args.bin",
  "optimizer.pt",
  "rng_state.pth",
  "scheduler.pkl",
  "vocab.pkl",
  "model.safetensors.bin",
]
INSTEAD = [WEIGHTS, INDEX, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
INSTEAD += ["special_tokens_map.json", "chat_template.jinja"]


def places():
  """(what it is, how a directory is made of the payload)."""
  for name, how in itertools.product(ALONE, WRAPPED):
    yield (
      f"{name}, {how}, alone",
      lambda d, data, n=name, h=how: ((d / WEIGHTS).unlink(), (d / n).write_bytes(WRAPPED[h](data))),
    )
  for name in BESIDE:
    yield f"{name} beside", lambda d, data, n=name: (d / n).write_bytes(data)
  for name, how in itertools.product(INSTEAD, WRAPPED):
    yield f"{name}, {how}", lambda d, data, n=name, h=how: instead(d, n, WRAPPED[h](data))
  yield f"{WEIGHTS} with metadata", lambda d, data: (d / WEIGHTS).write_bytes(header(data))
  for key in ("auto_map", "trust_remote_code", "custom_pipelines"):
    yield f"code by {key}", lambda d, data, k=key: code(d, data, k)


def instead(directory, name, data):
  """A payload in place of a file; of an index, without what comes before one."""
  if name == INDEX:
    (directory / WEIGHTS).unlink()
  (directory / name).write_bytes(data)


def code(directory, data, key):
  """Modules that config.json and tokenizer_config.json name."""
  for name in (
    "modeling_llama.py",
    "configuration_llama.py",
    "tokenization_llama.py",
    "conftest.py",
    "jinja2.py",
    "tokenizers.py",
  ):
    (directory / name).write_bytes(module(data))
  named = {
    "auto_map": {
      "AutoModelForCausalLM": "modeling_llama.Model",
      "AutoTokenizer": ["tokenization_llama.T", None],
    }
  }
  named |= {
    "trust_remote_code": True,
    "custom_pipelines": {"text-generation": {"impl": "modeling_llama.Model"}},
  }
  (directory / "config.json").write_text(json.dumps(SETTINGS | {key: named[key]}))
  plain = json.loads((directory / "tokenizer_config.json").read_text())
  (directory / "tokenizer_config.json").write_text(json.dumps(plain | {key: named[key]}))


def make(root, good, count):
  """`count` directories below root, (path, what it is) each; the canary is root's own file."""
  kinds, payloads = (
    itertools.cycle(places()),
    itertools.cycle(itertools.product(PROTOCOLS, calls(str(root / "canary")))),
  )
  made = []
  for i, (what, place), (protocol, call) in zip(range(count), kinds, payloads, strict=False):
    directory = root / f"{i:03}"
    shutil.copytree(good, directory)
    place(directory, pickle.dumps(Call(*call), protocol))
    made.append((directory, f"{what}, {getattr(call[0], '__name__', call[0])}, protocol {protocol}"))
  return made
