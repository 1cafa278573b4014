"""The trigram baseline against a dictionary of counts, and against sources of known entropy."""

import collections

import numpy as np
import pytest

from jaxllm.evaluate.trigram import Trigram

TEXT = b"the cat sat on the mat. the rat ate the cat's hat; that was that.\n" * 3 + b"x"


def array(text):
  return np.frombuffer(text, np.uint8)


def witten_bell(text):
  """P(byte | context of up to two bytes), by the recursion itself."""
  counts = collections.defaultdict(collections.Counter)
  for order in range(3):
    for i in range(order, len(text)):
      counts[text[i - order : i]][text[i]] += 1

  def p(byte, context):
    shorter = p(byte, context[1:]) if context else 1 / 256
    seen = counts[context]
    total, distinct = sum(seen.values()), len(seen)
    return (seen[byte] + distinct * shorter) / (total + distinct) if total else shorter

  return p


@pytest.mark.core
def test_equal_to_witten_bell_with_dictionaries():
  windows = np.stack([array(TEXT[:40]), array(b"the dog sat; \xff\xfe that hat was xqxq th ats")[:40]])
  p = witten_bell(TEXT)
  expected = [
    [-np.log(p(int(row[i]), bytes(row[max(0, i - 2) : i].tolist()))) for i in range(1, len(row))]
    for row in windows
  ]
  np.testing.assert_allclose(Trigram(array(TEXT)).nats(windows), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("context", [b"th", b"e ", b"hx", b"xq", b"\xff\xff", b"\0\0"])
def test_probabilities_of_all_bytes_sum_to_one(context):
  windows = np.array([[*context, byte] for byte in range(256)])
  nats = Trigram(array(TEXT)).nats(windows)
  np.testing.assert_allclose(np.exp(-nats[:, 1]).sum(), 1, rtol=1e-12)
  first = Trigram(array(TEXT)).nats(np.array([[context[1], byte, 0] for byte in range(256)]))[:, 0]
  np.testing.assert_allclose(np.exp(-first).sum(), 1, rtol=1e-12)


def test_the_first_label_has_one_byte_of_context():
  model, p = Trigram(array(TEXT)), witten_bell(TEXT)
  for window in (b"the", b"hat", b"\0at"):
    first = model.nats(array(window)[None])[0, 0]
    np.testing.assert_allclose(first, -np.log(p(window[1], window[:1])), rtol=1e-12)


@pytest.mark.parametrize(
  ("make", "bits"),
  [
    pytest.param(lambda coin: coin, 0.7219, id="a coin of 0.2"),
    # x_t = x_(t-2), but for the coin: a fair coin to any model of one byte of context
    pytest.param(lambda coin: _xor_of_alternate(coin), 0.7219, id="two bytes of context needed"),
  ],
)
def test_a_source_of_known_entropy(make, bits):
  rng = np.random.default_rng(0)
  text = make((rng.random(300_000) < 0.2).astype(np.uint8)) + ord("a")
  train, test = text[:250_000], text[250_000:].reshape(-1, 1000)
  found = Trigram(train).nats(test).mean() / np.log(2)
  assert abs(found - bits) < 0.01  # one standard deviation of the mean of 50,000 throws is 0.0036


def _xor_of_alternate(coin):
  """x_t = x_(t-2) xor coin_t."""
  out = np.empty_like(coin)
  out[0::2], out[1::2] = np.cumsum(coin[0::2]) % 2, np.cumsum(coin[1::2]) % 2
  return out
