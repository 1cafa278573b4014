"""Write text as a file of token ids, NAME.bin with NAME.json beside it, which training maps into memory.

Each document is encoded by the tokenizer of a checkpoint (the extra `hub` reads tokenizer.json) without special tokens, but
after its bos where the tokenizer puts one before any text, and ended by --separator.
"""

import json
from pathlib import Path

from absl import flags

from jaxllm.errors import ConfigError, DataError, TokenizerError
from jaxllm.study import run_app

FLAGS = flags.FlagValues()
flags.DEFINE_string("text", None, "a UTF-8 file, or a directory of such", flag_values=FLAGS)
flags.DEFINE_string(
  "tokenizer", None, "the directory or repository of the Hub that has the tokenizer", flag_values=FLAGS
)
flags.DEFINE_string("out", None, "the file to write, NAME.bin", flag_values=FLAGS)
flags.DEFINE_enum(
  "documents",
  "file",
  ["file", "line", "jsonl"],
  'what is a document: a file, a line that is not empty, or the "text" of a line of JSON',
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  "separator", None, "the id that ends a document; default the tokenizer's eos", flag_values=FLAGS
)


def check(f) -> None:
  """Refuse what nothing can be written from."""
  for name in ("text", "tokenizer", "out"):
    if not f[name].value:
      raise ConfigError(f"--{name}: missing; give --text=FILE|DIR --tokenizer=DIR --out=NAME.bin")
  out = Path(f.out)
  if out.suffix != ".bin":
    raise ConfigError(f"--out={f.out}: expected a name that ends with .bin")
  if there := [str(path) for path in (out, out.with_suffix(".json")) if path.exists()]:
    raise ConfigError(f"--out={f.out}: {' and '.join(there)} there already; give another, or remove it")


def texts(path: Path, documents: str):
  """(where it is, text) of every document."""
  from jaxllm.train import data
  from jaxllm.train.tokens import printable

  root, names = data.text_files(path)
  for name in names:
    file = printable(root / name)
    if documents == "file":
      yield file, data.read_text(root / name).decode()
      continue
    with open(root / name, "rb") as lines:
      for number, line in enumerate(lines, 1):
        if line.strip():
          yield f"{file}, line {number}", _line(line, documents, f"{file}, line {number}")


def _line(line: bytes, documents: str, where: str) -> str:
  try:
    text = line.decode().rstrip("\r\n")
    if documents == "line":
      return text
    record = json.loads(text)
  except (ValueError, RecursionError) as e:
    wanted = "UTF-8 text" if documents == "line" else 'JSON, {"text": ...}'
    raise DataError(f"{where}: expected {wanted} ({str(e)[:100]})") from None
  if not isinstance(record, dict) or not isinstance(record.get("text"), str):
    raise DataError(f'{where}: expected {{"text": ...}}, found {text[:60]!r}')
  return record["text"]


def main(f) -> int:
  """Write the file; 0."""
  from jaxllm import hf
  from jaxllm.train.tokens import write_text

  tokenizer = hf.load_tokenizer(f.tokenizer)
  separator = f.separator if f.separator is not None else next(iter(tokenizer.eos_ids), None)
  if separator is None:
    raise ConfigError(
      f"--separator: {tokenizer.source} names no eos; give the id that is to end each document"
    )
  if not 0 <= separator < tokenizer.vocab_size:
    raise ConfigError(
      f"--separator={separator}: expected an id from 0 to {tokenizer.vocab_size - 1}, those of {tokenizer.source}"
    )
  bos = tokenizer.bos_id
  first = [bos] if bos is not None and tokenizer.encode("")[:1] == [bos] else []
  count = 0

  def encoded():
    nonlocal count
    for where, text in texts(Path(f.text), f.documents):
      try:
        ids = tokenizer.encode(text, special_tokens=False)
      except TokenizerError as e:
        raise TokenizerError(f"{where}: {e}") from None
      if separator in ids:
        raise DataError(
          f"{where}: its text has the token {separator}, which ends documents; give another --separator, or remove it"
        )
      count += 1
      yield [*first, *ids]

  Path(f.out).parent.mkdir(parents=True, exist_ok=True)
  header = write_text(f.out, encoded(), tokenizer.vocab_size, separator, tokenizer.source)
  print(
    f"{f.out}: {header['tokens']} tokens of {count} documents, {header['dtype']}, vocabulary {header['vocab_size']}, "
    f"separator {separator}"
  )
  return 0


if __name__ == "__main__":
  run_app(main, check, values=FLAGS)
