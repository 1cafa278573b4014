"""A text as tokens: every byte belongs to one token, and windows are cut from tokens and bytes alike."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import DataError, TokenizerError
from jaxllm.evaluate import text as t
from jaxllm.evaluate.windows import bits_per_byte

WORDS = "the cat sat on the mat, señor — 你好 🙂 the cat; naïve  spaces"


def byte_level_bpe(corpus, size):
  """A trained byte-level BPE, whose tokens may be parts of a character."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
  backend.train_from_iterator([corpus], trainer)
  return backend


BPE = byte_level_bpe(WORDS * 3, 300)


def read(text):
  encoding = BPE.encode(text)
  ends = np.array([end for _, end in encoding.offsets], np.int64)
  return t.of_tokens(text, np.array(encoding.ids), ends), encoding


def byte_count(token):
  """The bytes of a token of a byte-level BPE: a character of its name each."""
  return len(token)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60))
@settings(max_examples=150, deadline=None)
def test_sizes_add_up_to_the_bytes_of_the_text(text):
  found, encoding = read(text)
  assert found.sizes.sum() == len(text.encode()) and found.sizes.min() >= 0
  # up to each end of a whole character the sums are those of the tokens' own bytes
  own = np.cumsum([byte_count(token) for token in encoding.tokens])
  ends = [end for _, end in encoding.offsets]
  whole = [i for i in range(len(ends)) if i + 1 == len(ends) or ends[i + 1] > ends[i]]
  np.testing.assert_array_equal(np.cumsum(found.sizes)[whole], own[whole])


def test_a_token_has_its_own_bytes_and_parts_of_a_character_share_its():
  found, encoding = read("the señor")
  assert dict(zip(encoding.tokens, found.sizes, strict=True))["the"] == 3
  ends = np.array([1, 1, 1, 1, 2])
  np.testing.assert_array_equal(t.of_tokens("🙂a", np.zeros(5), ends).sizes, [1, 1, 1, 1, 1])
  np.testing.assert_array_equal(t.of_tokens("你a", np.zeros(3), np.array([1, 1, 2])).sizes, [1, 2, 1])


def test_special_tokens_stand_for_nothing():
  ends = np.array([0, 2, 5, 0])
  np.testing.assert_array_equal(t.of_tokens("ab cd", np.zeros(4), ends).sizes, [0, 2, 3, 0])


def test_windows_begin_with_the_token_that_begins_a_text():
  ids, sizes = np.arange(100), np.arange(100) % 7
  plain, begun = t.Text(ids, sizes), t.Text(ids, sizes, bos=99)
  tokens, counts = plain.windows(8, 16, 5)
  np.testing.assert_array_equal(counts, tokens[:, 1:] % 7)
  other, same = begun.windows(8, 16, 5)
  assert (other[:, 0] == 99).all()
  np.testing.assert_array_equal(other[:, 1:], tokens[:, 1:])
  np.testing.assert_array_equal(same, counts)


def test_bits_are_of_the_bytes():
  nats = np.array([[np.log(2), 2 * np.log(2), 0.0]], np.float32)
  assert bits_per_byte(nats) == pytest.approx(1.0, rel=1e-7)
  assert bits_per_byte(nats, np.array([[1, 4, 1]])) == pytest.approx(0.5, rel=1e-7)


def test_ids_are_checked_on_the_host():
  t.check_ids(np.array([0, 7]), 8, "text")
  with pytest.raises(TokenizerError, match=r"text: 2 of 3 .* is token 1: found id 8, expected 0 to 7"):
    t.check_ids(np.array([0, 8, -1]), 8, "text")
  with pytest.raises(DataError, match="no tokens"):
    t.check_ids(np.array([], np.int32), 8, "text")
