"""Text to token ids and back, as the tokenizer files of a checkpoint say; and the byte-level tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.errors import TokenizerError
from jaxllm.hf import chat as chat_lib
from jaxllm.hf import files, hub, sums
from jaxllm.hf.plain import SETTINGS_LIMIT, plain_file, read_bytes, read_json

if TYPE_CHECKING:
  from jaxllm.config import ModelConfig

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL = "special_tokens_map.json"
FILES = (
  *(TOKENIZER, SETTINGS, TEMPLATE, SPECIAL, "added_tokens.json"),
  *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"),
)
OTHER_KINDS = ("tokenizer.model", "vocab.json", "vocab.txt")
"""Without a tokenizer.json, files of which transformers makes a tokenizer."""

LIMIT = 256 << 20
"""Bytes of a tokenizer.json; the largest are a tenth of it."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Text <-> ids.

  source: where it is from.  vocab_size: its largest id and 1, added tokens included.  bos_id, eos_ids: of its settings.
  special: its special tokens by their names in the settings ("bos_token", ...).  template: of chats, in Jinja.  files: what
  `save` writes, contents or paths.  added: the ids of tokens that were added to the vocabulary, whose
  largest id and 1 is base_size (None: vocab_size).  rows: of the model's embedding,
  None: not known; an id that has no row is never encoded.
  """

  source: str
  vocab_size: int
  encoder: Callable[[str, bool], Sequence[int]] = dataclasses.field(repr=False)
  decoder: Callable[[Sequence[int], bool], str] = dataclasses.field(repr=False)
  placer: Callable[[str], tuple[Sequence[int], Sequence[int]]] = dataclasses.field(repr=False)
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  special: Mapping[str, str] = dataclasses.field(default_factory=dict)
  template: str | None = dataclasses.field(default=None, repr=False)
  files: Mapping[str, bytes | Path] = dataclasses.field(default_factory=dict, repr=False)
  added: Mapping[str, int] = dataclasses.field(default_factory=dict, repr=False)
  base_size: int | None = None
  rows: int | None = None

  def encode(self, text: str, special_tokens: bool = True) -> list[int]:
    """The ids of a text, with those that the tokenizer puts around any (as a first bos) unless special_tokens is False.

    Raises TokenizerError for text that is not Unicode, and for a token that the model has no embedding of.
    """
    return self._have_rows(self.encoder(self._checked(text), special_tokens))

  def encode_ends(self, text: str) -> tuple[list[int], list[int]]:
    """`encode`, and the end of each token in the text, in characters: 0 for a special token, which is not in it.

    Raises TokenizerError as `encode`, and for a tokenizer that does not tell the places.
    """
    text = self._checked(text)
    try:
      ids, ends = self.placer(text)
    except NotImplementedError:
      raise TokenizerError(
        f"{self.source}: this tokenizer does not tell which text a token stands for; save it as {TOKENIZER} with transformers"
      ) from None
    return self._have_rows(ids), list(ends)

  def decode(self, ids: Sequence[int], special_tokens: bool = True) -> str:
    """The text of some ids, special tokens spelled out or, for False, left out.  TokenizerError for an id it does not have."""
    ids = [int(i) for i in ids]
    if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
      raise TokenizerError(
        f"token id {wrong[0]}: expected one from 0 to {self.vocab_size - 1}, those of {self.source}"
      )
    return self.decoder(ids, special_tokens)

  def _have_rows(self, ids: Sequence[int]) -> list[int]:
    """The ids, each of which has an embedding: for others JAX reads the last row, in silence."""
    ids = list(ids)
    if self.rows is not None and (largest := max(ids, default=-1)) >= self.rows:
      token = next((token for token, i in self.added.items() if i == largest), "")
      raise TokenizerError(
        f"{self.source}: the text has the token {token!r}, id {largest}, but the embedding of the model has {self.rows} rows; "
        "leave that token out of the text"
      )
    return ids

  @staticmethod
  def _checked(text: str) -> str:
    try:
      text.encode()
    except UnicodeEncodeError as e:
      raise TokenizerError(
        f"text: found the lone surrogate {text[e.start]!r} at character {e.start}, expected what UTF-8 can hold"
      ) from None
    return text

  def chat_text(self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool = True) -> str:
    """The text of a chat, [{"role": ..., "content": ...}, ...], by the checkpoint's own template, up to the answer.

    Raises TokenizerError where there is no template, and for all that goes wrong in it.
    """
    if self.template is None:
      raise TokenizerError(
        f"{self.source}: no chat template; give text to `encode`, or take a model tuned for chats"
      )
    values = {**self.special, "messages": list(messages), "add_generation_prompt": generation_prompt}
    return chat_lib.render(self.template, values, self.source)

  def chat(self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool = True) -> list[int]:
    """The ids of `chat_text`; the template writes the special tokens itself."""
    return self.encode(self.chat_text(messages, generation_prompt), special_tokens=False)

  def check_fits(self, vocab_size: int, model: str) -> None:
    """Raise TokenizerError where the vocabulary has ids that an embedding of `vocab_size` rows has not.

    JAX reads the last row for them, in silence.  Added tokens beyond it are a warning, as texts may do without: Gemma 3 1B has
    one of images, id 262144 of 262144 rows.  An embedding with more rows than ids is fine: many are padded.
    """
    base = self.vocab_size if self.base_size is None else self.base_size
    if base > vocab_size:
      raise TokenizerError(
        f"{self.source}: the tokenizer has ids up to {base - 1}, but the embedding of {model} has {vocab_size} "
        "rows; take the tokenizer that the model was trained with"
      )
    beyond = [
      f"{token} ({i})" for token, i in sorted(self.added.items(), key=lambda one: one[1]) if i >= vocab_size
    ]
    if self.vocab_size < vocab_size:
      spare = vocab_size - self.vocab_size
      _log.info(
        "%s: %d rows of the embedding of %s have no token: padding, which is fine", self.source, spare, model
      )
    if beyond:
      more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
      _log.warning(
        "%s: added tokens without a row in the embedding of %s, which has %d: %s%s; text that has one is refused",
        *(self.source, model, vocab_size, ", ".join(beyond[:5]), more),
      )

  def contents(self) -> dict[str, bytes]:
    """The files that make this tokenizer again, by name."""
    return {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in self.files.items()}


class NoTokenizerError(TokenizerError):
  """There are no files of a tokenizer, or not the package that reads them: nothing is wrong with the checkpoint."""


def load_tokenizer(
  path_or_repo: str | os.PathLike, cfg: ModelConfig | None = None, verify: bool = True
) -> Tokenizer:
  """The tokenizer of a directory or a repository of the Hub (`hub.find`): of tokenizer.json or, without one, by transformers.

  verify: compare its files with their SHA-256, where `sums.of` finds any.

  Raises NoTokenizerError, a TokenizerError, where there is none or what reads it is not installed; TokenizerError where it
  cannot be read, and where its vocabulary has more ids than the model (cfg, or else the vocab_size of config.json there) has
  embeddings or lacks the first or last token that its settings name; CheckpointError for files with another SHA-256.
  """
  directory = hub.find(path_or_repo, weights=False)
  there = {name: plain_file(directory, name) for name in FILES if os.path.lexists(directory / name)}
  if verify:
    sums.of(directory).check({*there, files.CONFIG})
  settings = _settings(there)
  if "auto_map" in settings:
    _log.warning("%s: names code of its own (auto_map), which is never run", there[SETTINGS])
  if TOKENIZER in there:
    tokenizer = _from_json(directory, there, settings)
  elif any(name in there for name in OTHER_KINDS):
    tokenizer = _from_transformers(directory, there, settings)
  else:
    raise NoTokenizerError(
      f"{directory}: no {TOKENIZER}, {' or '.join(OTHER_KINDS)}; copy the tokenizer of the model there"
    )
  vocab_size, model = (None, str(directory)) if cfg is None else (cfg.vocab_size, "the model")
  if cfg is None and os.path.lexists(directory / files.CONFIG):
    path = plain_file(directory, files.CONFIG)
    vocab_size, model = read_json(path, TokenizerError, SETTINGS_LIMIT).get("vocab_size"), str(path)
  if type(vocab_size) is int:
    tokenizer.check_fits(vocab_size, model)
    tokenizer = dataclasses.replace(tokenizer, rows=vocab_size)
  return tokenizer


def _settings(there: Mapping[str, Path]) -> dict[str, Any]:
  """tokenizer_config.json, with the special tokens that only special_tokens_map.json names."""
  settings, named = (
    read_json(there[name], TokenizerError) if name in there else {} for name in (SETTINGS, SPECIAL)
  )
  return settings | {
    name: token for name, token in named.items() if name.endswith("_token") and not settings.get(name)
  }


@functools.cache
def _byte_json() -> dict[str, Any]:
  """tokenizer.json of `byte_tokenizer`: a BPE without merges over the 256 characters that stand for bytes."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
  bytes_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
  model = {"type": "BPE", "vocab": {characters[byte]: byte for byte in range(256)}, "merges": []}
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": bytes_level,
    "post_processor": None,
    "decoder": bytes_level,
    "model": model,
  }


def byte_tokenizer() -> Tokenizer:
  """The tokenizer whose ids are the bytes of UTF-8, 0 to 255, without special tokens: the vocabulary of the sweep's models.

  `save` writes it for `tokenizers` and transformers.AutoTokenizer, which read the same ids.  The characters that stand for
  bytes there are those of GPT-2: printable ones for themselves, the others from 256 on.
  """
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
  contents = {TOKENIZER: _byte_json(), SETTINGS: settings}
  return Tokenizer(
    source="byte_tokenizer",
    vocab_size=256,
    encoder=lambda text, _: text.encode(),
    decoder=lambda ids, _: bytes(ids).decode(errors="replace"),
    placer=lambda text: (
      text.encode(),
      [end for end, character in enumerate(text, 1) for _ in character.encode()],
    ),
    files={
      name: (json.dumps(plain, ensure_ascii=False, indent=2) + "\n").encode()
      for name, plain in contents.items()
    },
  )


def _from_json(directory: Path, there: dict[str, Path], settings: Mapping[str, Any]) -> Tokenizer:
  data = read_bytes(there[TOKENIZER], TokenizerError, LIMIT)
  if data == (own := byte_tokenizer()).files[TOKENIZER]:  # much faster, and nothing to install
    return dataclasses.replace(own, source=str(directory), files=there, template=_template(there, settings))
  try:
    import tokenizers
  except ImportError:
    raise NoTokenizerError(
      f"{there[TOKENIZER]}: the package tokenizers reads it; install the extra `hub` ({hub.INSTALL})"
    ) from None
  try:
    backend = tokenizers.Tokenizer.from_str(data.decode())
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as e:  # of Rust, without a type of its own; where it panics not even an Exception
    raise TokenizerError(
      f"{there[TOKENIZER]}: not a tokenizer ({str(e)[:200]}); fetch the file again"
    ) from None
  backend.no_truncation()  # of the training, which some files still have
  backend.no_padding()

  def places(text: str) -> tuple[list[int], list[int]]:
    encoding = backend.encode(text)
    return encoding.ids, [end for _, end in encoding.offsets]

  return _tokenizer(
    directory,
    there,
    settings,
    backend.get_vocab(with_added_tokens=False),
    backend.get_vocab(with_added_tokens=True),
    lambda text, special: backend.encode(text, add_special_tokens=special).ids,
    lambda ids, special: backend.decode(ids, skip_special_tokens=not special),
    places,
    backend.token_to_id,
  )


def _from_transformers(directory: Path, there: dict[str, Path], settings: Mapping[str, Any]) -> Tokenizer:
  try:
    import transformers
  except ImportError:
    raise NoTokenizerError(
      f"{directory}: no {TOKENIZER}; transformers makes a tokenizer of the other files: pip install transformers, or fetch one"
    ) from None
  try:
    backend = transformers.AutoTokenizer.from_pretrained(
      directory, trust_remote_code=False, local_files_only=True
    )
    vocab, added = backend.get_vocab(), backend.get_added_vocab()
  except Exception as e:  # whatever it and the packages below it raise
    raise TokenizerError(
      f"{directory}: transformers makes no tokenizer of the files ({str(e)[:200]})"
    ) from None

  def places(text: str) -> tuple[list[int], list[int]]:
    found = backend(text, return_offsets_mapping=True)  # NotImplementedError of the slow kind
    return found["input_ids"], [end for _, end in found["offset_mapping"]]

  return _tokenizer(
    directory,
    there,
    settings,
    {token: i for token, i in vocab.items() if token not in added},
    vocab,
    lambda text, special: backend.encode(text, add_special_tokens=special),
    lambda ids, special: backend.decode(ids, skip_special_tokens=not special),
    places,
    vocab.get,
  )


def _tokenizer(directory, there, settings, base, vocab, encoder, decoder, placer, find) -> Tokenizer:
  """The tokenizer of a directory with what its settings say of special tokens and chats."""
  special = {}
  for name, token in settings.items():
    token = token.get("content") if isinstance(token, dict) else token
    if name.endswith("_token") and isinstance(token, str):
      special[name] = token
  ids = {name: find(token) for name, token in special.items()}
  if lost := [
    f"{name} = {special[name][:80]!r}" for name in ("bos_token", "eos_token") if ids.get(name, 0) is None
  ]:
    raise TokenizerError(
      f"{directory}: {' and '.join(lost)} of {SETTINGS} or {SPECIAL}: not in the vocabulary; take the files of one tokenizer"
    )
  return Tokenizer(
    source=str(directory),
    vocab_size=max(vocab.values(), default=-1) + 1,
    encoder=encoder,
    decoder=decoder,
    placer=placer,
    bos_id=ids.get("bos_token"),
    eos_ids=() if ids.get("eos_token") is None else (ids["eos_token"],),
    special=special,
    template=_template(there, settings),
    files=there,
    added={token: i for token, i in vocab.items() if token not in base},
    base_size=max(base.values(), default=-1) + 1,
  )


def _template(there: Mapping[str, Path], settings: Mapping[str, Any]) -> str | None:
  if TEMPLATE in there:
    try:
      return read_bytes(there[TEMPLATE], TokenizerError, SETTINGS_LIMIT).decode()
    except UnicodeDecodeError as e:
      raise TokenizerError(f"{there[TEMPLATE]}: not UTF-8 ({e.reason}); fetch the file again") from None
  template = settings.get("chat_template")
  if isinstance(template, list):  # several by name
    named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
    template = named.get("default")
  return template if isinstance(template, str) else None
