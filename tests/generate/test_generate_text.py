"""Text as it comes: what is shown is never taken back, no character is shown before it is whole, and all is shown in the end;
a row ends at the first token with which a stop string is in its text."""

import codecs
import itertools

import pytest
import text_case
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import ConfigError
from jaxllm.generate.text import REPLACEMENT, Detokenizer, StopStrings, Stream, broken_id

TEXTS = [
  *text_case.LINES[:3],
  "a",
  " leading and trailing ",
  "\n\n  \n",
  "\U0001f600",
  "1\U0001f600\n\U0001f680你",
  "the end of a replacement \ufffd and on",
  "\u2581literal \U0001f1e9\U0001f1ea",
]
MANY = settings(max_examples=150, deadline=None, derandomize=True)
FULL = settings(max_examples=2000, deadline=None, derandomize=True)


def streamed(kind, ids, before=(), sizes=(1,)):
  """(decode, text so far after each push, the Detokenizer), finished."""
  decode, _, count = text_case.made(kind)
  text, shown, at = Detokenizer(decode, broken_id(decode, count), before), [""], 0
  for size in itertools.cycle(sizes):
    if at >= len(ids):
      break
    shown.append(shown[-1] + text.push(ids[at : at + size]))
    assert shown[-1] == text.settled
    at += size
  shown.append(shown[-1] + text.finish())
  assert shown[-1] == text.settled == text.text
  return decode, shown, text


@pytest.mark.core
@pytest.mark.parametrize("kind", text_case.KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_whole_characters_at_a_time(kind, text):
  _, encode, _ = text_case.made(kind)
  ids = encode(text)
  decode, shown, _ = streamed(kind, ids)
  assert shown[-1] == decode(ids)
  if kind != "word_pieces":
    text = text.replace("\u2581", " ") if kind == "sentencepiece" else text
    assert shown[-1] == text
    assert all(text.startswith(one) for one in shown)  # no half characters, nor what stands for them


@pytest.mark.parametrize("kind", ["bytes", "byte_level"])
@pytest.mark.parametrize("text", [text for text in TEXTS if REPLACEMENT not in text])
def test_a_whole_character_is_shown_at_once(kind, text):
  """Bytes have no neighbours that change them, so each is shown with its last byte."""
  decode, encode, _ = text_case.made(kind)
  _, shown, _ = streamed(kind, encode(text))
  whole = codecs.getincrementaldecoder("utf-8")()
  ends = {len(text[:n].encode()): text[:n] for n in range(len(text) + 1)}
  if kind == "bytes":
    assert shown[1:-1] == list(itertools.accumulate(whole.decode(bytes([one])) for one in text.encode()))
  else:
    assert set(shown) <= set(ends.values())
    for n, one in enumerate(shown[1:-1], 1):
      assert decode(encode(text)[:n]).rstrip(REPLACEMENT) == one


@pytest.mark.parametrize("kind", text_case.KINDS)
def test_ids_without_sense_are_never_taken_back(kind):
  """Random ids: runs of bytes that are no UTF-8 among words, of which SentencePiece's fallback makes nothing, one id later."""
  decode, _, count = text_case.made(kind)
  broken = broken_id(decode, count)
  assert (broken is None) == (kind == "word_pieces")
  part = st.integers(max(0, count - 330), count - 1)
  high = (
    st.integers(0, count - 1).filter(lambda i: REPLACEMENT in decode([i])) if broken is not None else part
  )

  @MANY
  @given(
    st.lists(st.one_of(part, high), max_size=24), st.integers(0, 6), st.lists(st.integers(1, 5), min_size=1)
  )
  def check(ids, cut, sizes):
    decode, shown, text = streamed(kind, ids, sizes=sizes)
    assert shown[-1] == decode(ids) and text.ids == ids
    # after a prompt: the two together are the whole
    before, new = ids[:cut], ids[cut:]
    _, shown, text = streamed(kind, new, before, sizes)
    whole, prompt = decode(before + new), decode(before)
    if whole.startswith(prompt):
      assert shown[-1] == whole[len(prompt) :]
    else:  # the prompt ended within a character, which is shown
      assert whole.endswith(shown[-1]) and prompt.startswith(whole[: len(whole) - len(shown[-1])])

  check()


@pytest.mark.parametrize(
  ("prompt", "new", "wanted"),
  [
    ("the", " quick", " quick"),
    ("the\n", "\U0001f600!", "\U0001f600!"),
    ("", "the", "the"),
  ],
)
@pytest.mark.parametrize("kind", ["bytes", "byte_level", "sentencepiece"])
def test_a_continuation_reads_as_it_does_after_its_prompt(kind, prompt, new, wanted):
  """Its first space is not that of the beginning of a text, and a byte after the prompt's newline does not undo it."""
  _, encode, _ = text_case.made(kind)
  both, before = encode(prompt + new), encode(prompt)
  assert both[: len(before)] == before
  _, shown, _ = streamed(kind, both[len(before) :], before)
  assert shown[-1] == wanted


def test_the_window_of_ids_stays_short():
  """The cost of an id does not grow with the text."""
  decode, encode, count = text_case.made("sentencepiece")
  longest = []

  def watched(ids):
    longest.append(len(ids))
    return decode(ids)

  text = Detokenizer(watched, broken_id(decode, count), encode("the quick"))
  text.push(encode("the lazy dog \U0001f600 " * 30))
  assert max(longest) < 30


def test_a_decoder_that_looks_further_back_is_followed():
  """One that drops what repeats, so that its windows do not read as parts of the whole: `text` is right in the end."""
  decode = lambda ids: "".join(chr(97 + i) for n, i in enumerate(ids) if i not in ids[:n])
  ids = [0, 1, 2, 0, 3, 1, 4]
  text = Detokenizer(decode, None)
  text.push(ids)
  text.finish()
  assert text.text == decode(ids) == "abcde"


STOPS = ["\n\n", "dog", "\U0001f600", "你好", "own f", "x"]


@pytest.mark.core
@pytest.mark.parametrize("kind", ["bytes", "byte_level", "sentencepiece"])
@pytest.mark.parametrize("text", [*TEXTS[:3], "a\n\nb", "\n\n", "one \U0001f680\U0001f600 two", "xx"])
def test_a_row_ends_at_the_first_token_with_a_stop_string(kind, text):
  decode, encode, count = text_case.made(kind)
  ids = encode(text)
  wanted = next((n for n in range(1, len(ids) + 1) if any(s in decode(ids[:n]) for s in STOPS)), None)
  by_one = StopStrings(STOPS, decode, broken=broken_id(decode, count))
  found = next((n for n in range(1, len(ids) + 1) if by_one(0, ids[:n]) is not None), None)
  assert found == wanted
  assert by_one(0, ids) == wanted  # asked again, of all
  assert StopStrings(STOPS, decode)(0, ids) == wanted  # without a broken id, one long look
  shown, string = by_one.cut(decode(ids[:wanted] if wanted else ids))
  assert (string is None) == (wanted is None) and not any(s in shown for s in STOPS)


@pytest.mark.parametrize("kind", text_case.KINDS)
def test_random_ids_end_where_a_look_at_the_whole_text_ends_them(kind):
  decode, _, count = text_case.made(kind)
  broken = broken_id(decode, count)

  @MANY
  @given(st.lists(st.integers(0, count - 1), max_size=20), st.integers(0, 5), st.data())
  def check(ids, cut, data):
    before, ids = ids[:cut], ids[cut:]
    prompt = decode(before)
    strings = data.draw(st.lists(st.sampled_from(["t", "th", "e q", "\n", "你", "s,", " "]), max_size=3))
    stops = StopStrings(strings, decode, broken=broken, prompts=[before])
    stream = Stream(decode, broken, before, stops)
    shown, end = "", None
    for n in range(1, len(ids) + 1):
      end = stops(0, ids[:n])
      shown += stream.push(ids[n - 1 : n])
      assert not any(s in shown for s in strings)
      if end is not None:
        assert end == n
        break
    shown += stream.finish()
    assert shown == stream.text and (stream.stopped is not None) == (end is not None)
    whole = decode(before + ids[: end if end is not None else len(ids)])
    if whole.startswith(prompt):
      assert shown == stops.cut(whole[len(prompt) :])[0]

  check()


def test_an_end_that_may_become_a_stop_string_waits():
  decode = text_case.made("bytes")[0]
  stream = Stream(decode, 128, b"", StopStrings(["\nUser:", "\nU!"], decode))
  shown = [stream.push(piece) for piece in (b"hi", b"\n", b"Us", b"a", b"\n", b"User:")]
  assert shown == ["hi", "", "", "\nUsa", "", ""]
  assert stream.finish() == "" and stream.text == "hi\nUsa" and stream.stopped == "\nUser:"


@pytest.mark.parametrize("strings", [["\n\n"], ["a"], ["ab", "\n\nUser:"]])
def test_all_of_a_stop_string_but_its_last_character_waits(strings):
  decode = text_case.made("bytes")[0]
  for string in strings:
    for n in range(1, len(string)):
      stream = Stream(decode, 128, b"", StopStrings(strings, decode))
      assert stream.push(b"hi" + string[:n].encode()) == "hi"
      assert stream.push(b"-") == string[:n] + "-"  # it became none
      assert [stream.push([one]) for one in string.encode()] == [""] * len(string)
      assert stream.finish() == "" and stream.stopped == string


def test_rows_are_apart_and_a_new_text_begins_anew():
  decode = text_case.made("bytes")[0]
  stops = StopStrings(["ab"], decode)
  assert [stops(0, list(b"a")), stops(1, list(b"b")), stops(1, list(b"bb")), stops(0, list(b"ab"))] == [
    None,
    None,
    None,
    2,
  ]
  assert [stops(0, list(b"b")), stops(0, list(b"bx")), stops(1, list(b"xab"))] == [None, None, 3]


@pytest.mark.parametrize(("strings", "words"), [("ab", "a list"), ([1], "a list"), (["a", ""], "empty")])
def test_what_is_no_list_of_strings_is_refused(strings, words):
  with pytest.raises(ConfigError, match=words):
    StopStrings(strings, bytes.decode)


@pytest.mark.slow
@pytest.mark.parametrize("kind", text_case.KINDS)
def test_any_text_in_any_pieces(kind):
  _, encode, _ = text_case.made(kind)

  @FULL
  @given(st.text(max_size=30), st.lists(st.integers(1, 5), min_size=1))
  def check(text, sizes):
    ids = encode(text)
    decode, shown, _ = streamed(kind, ids, sizes=sizes)
    assert shown[-1] == decode(ids)

  check()
