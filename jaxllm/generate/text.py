"""Text as it comes: ids to characters that no later id changes, and stop strings in them.

`decode` is any function from ids to text: a tokenizer's, or `lambda ids: bytes(ids).decode(errors="replace")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from jaxllm.errors import ConfigError

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no UTF-8 (yet)."""


def broken_id(decode: Decode, vocab_size: int) -> int | None:
  """The first id that by itself is a part of a character; None where every id is whole characters."""
  return next((i for i in range(vocab_size) if decode([i]) == REPLACEMENT), None)


class Detokenizer:
  """The text of ids that come one after another: decode(before + ids) without what it shares with decode(before).

  settled: what every continuation begins with.  pending: what follows in the text as it is now, and may read otherwise with the
  next id.  A character may be spread over several ids, and a byte of fallback (SentencePiece's <0xE4>) changes how its
  neighbours read: [0A] is a newline, [0A, F0] two replacement characters, [0A, F0, 9F, 98, 80] a newline and an emoji.  So
  settled is what the text shares with that of one more broken byte, without replacement characters at the end.

  broken: `broken_id` of the decoder.  before: ids of the prompt; where they end within a character, it belongs to the text.
  An id costs two decodings of the ids since the last but one place at which all was settled: one back, so that the space with
  which a text begins, and which SentencePiece drops, is dropped once.
  """

  def __init__(self, decode: Decode, broken: int | None, before: Sequence[int] = ()):
    self.ids: list[int] = []
    self.settled = self.pending = ""
    self._decode, self._broken, self._before = decode, broken, list(before)
    self._before_text = decode(self._before) if self._before else ""
    self._from_start()

  @property
  def text(self) -> str:
    """All of it as it stands."""
    return self.settled + self.pending

  def push(self, ids: Iterable[int]) -> str:
    """What these ids settle."""
    known = len(self.settled)
    for one in ids:
      self.ids.append(int(one))
      self._step()
    return self.settled[known:]

  def finish(self) -> str:
    """The rest, where no id follows: from now on `settled` is all text, by one decoding of all ids."""
    full = self._decode(self._before + self.ids)
    known, self.pending = self.settled, ""
    self.settled = full[_shared(self._before_text, full) :]
    return self.settled[_shared(known, self.settled) :]

  def _from_start(self) -> None:
    """The window is all ids, of which _middle give _head; later _done is the text that was settled before the window."""
    self._window, self._middle = self._before + self.ids, len(self._before)
    self._head, self._done, self._first = self._before_text, "", True

  def _step(self) -> None:
    self._window.append(self.ids[-1])
    text = self._decode(self._window)
    if not (self._first or text.startswith(self._head)):  # a decoder that looks further back
      self._from_start()
      text = self._decode(self._window)
    begin = _shared(self._head, text)
    stays = len(text) if self._broken is None else _shared(text, self._decode([*self._window, self._broken]))
    stays = max(begin, len(text[:stays].rstrip(REPLACEMENT)))
    settled, whole = self._done + text[begin:stays], self._done + text[begin:]
    if settled.startswith(self.settled):
      self.settled = settled
    self.pending = whole[_shared(self.settled, whole) :]
    if begin < stays == len(text) and not self.pending:  # a place at which all is settled
      self._window, self._middle = self._window[self._middle :], len(self._window) - self._middle
      self._head, self._done, self._first = self._decode(self._window), self.settled, False


class StopStrings:
  """The `stop` of `loop.generate` for strings: a row ends at the first token with which its new text contains one of them.

  Also one that spans tokens, or ends within one: the ids keep the whole token, and `cut` takes the text before the string.
  prompts: the ids before each row, which tell how its first token reads; copies: the rows of each prompt (`loop.generate`,
  or n of `best_of`).  Raises ConfigError for what is no list of strings.
  """

  def __init__(
    self,
    strings: Sequence[str],
    decode: Decode,
    *,
    broken: int | None = None,
    prompts: Sequence[Sequence[int]] = (),
    copies: int = 1,
  ):
    if isinstance(strings, str) or not all(isinstance(one, str) for one in strings):
      raise ConfigError(f"stop strings: found {strings!r}, expected a list of strings")
    if "" in strings:
      raise ConfigError("stop strings: found an empty one, which is in every text; leave it out")
    self.strings = tuple(strings)
    self._decode, self._broken, self._prompts = decode, broken, prompts
    self._copies = copies
    self._longest = max(map(len, self.strings), default=0)
    self._rows: dict[int, Detokenizer] = {}

  def __call__(self, row: int, ids: Sequence[int]) -> int | None:
    """How many of the new ids of a row to keep, where a stop string is in their text; None where none is."""
    if not self.strings:
      return None
    text = self._rows.get(row)
    if text is None or text.ids != ids[: len(text.ids)]:  # another text
      prompt = row // self._copies
      if self._prompts and prompt >= len(self._prompts):
        raise ConfigError(
          f"stop strings: found row {row} and {len(self._prompts)} prompts, expected one a row; give copies, the rows of each"
        )
      before = self._prompts[prompt] if self._prompts else ()
      text = self._rows[row] = Detokenizer(self._decode, self._broken, before)
    for one in ids[len(text.ids) :]:
      begin = max(0, len(text.settled) - self._longest)
      text.push([one])
      if any(string in text.text[begin:] for string in self.strings):
        return len(self._rows.pop(row).ids)
    return None

  def cut(self, text: str) -> tuple[str, str | None]:
    """(the text before the first stop string in it, that string); (all of it, None) where there is none."""
    found = [(text.find(string), -len(string), string) for string in self.strings if string in text]
    if not found:
      return text, None
    at, _, string = min(found)
    return text[:at], string

  def shown(self, text: str) -> str:
    """What may be shown of a text that goes on: without a stop string, or an end that may become one."""
    text, found = self.cut(text)
    if found is not None:
      return text
    longest = min(len(text), self._longest - 1)
    beginning = (
      n for n in range(longest, 0, -1) if any(s.startswith(text[len(text) - n :]) for s in self.strings)
    )
    return text[: len(text) - next(beginning, 0)]


class Stream:
  """The text of one row as it may be shown: settled, and cut before stop strings."""

  def __init__(
    self, decode: Decode, broken: int | None, before: Sequence[int] = (), stops: StopStrings | None = None
  ):
    self._text = Detokenizer(decode, broken, before)
    self._stops = stops if stops is not None else StopStrings((), decode)
    self.text = ""
    self.stopped: str | None = None

  @property
  def ids(self) -> list[int]:
    """All new ids so far."""
    return self._text.ids

  def push(self, ids: Iterable[int]) -> str:
    """What is shown with these ids."""
    self._text.push(ids)
    return self._show(self._stops.shown(self._text.settled))

  def finish(self) -> str:
    """What is shown at the end; `text` is all then, and `stopped` the stop string that it was cut before."""
    self._text.finish()
    text, self.stopped = self._stops.cut(self._text.text)
    return self._show(text)

  def _show(self, text: str) -> str:
    new = text[_shared(self.text, text) :]
    self.text = text if text.startswith(self.text) else self.text
    return new


def _shared(a: str, b: str) -> int:
  """How many characters two texts begin with in common."""
  if b.startswith(a):
    return len(a)
  return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
