"""Damaged files by the ten thousand: what a generator makes of good bytes, and what came of reading them."""

import collections
import json
import random
import re
import resource
import time

from jaxllm.errors import JaxllmError

NUMBERS = [
  0,
  1,
  -1,
  2,
  3,
  7,
  8,
  9,
  2**31 - 1,
  2**31,
  2**32,
  2**40,
  2**40 + 1,
  2**53,
  2**63 - 1,
  2**63,
  2**64 - 1,
  2**64,
]
NUMBERS += [10**18, 10**30, -(2**63), 0.0, -0.0, 0.5, 1.0, 1e-9, -1.5, 1e17, 1e308, 1e-320]
TEXTS = [
  "",
  "a",
  "F32",
  "BF16",
  "U8",
  "F4",
  "__metadata__",
  "\0",
  "\n",
  "\ud800",
  "é",
  "\x1b[0m",
  "x" * 513,
  "../x",
  "nan",
  "null",
]
TEXTS += ["linear", "yarn", "longrope", "default", "silu", "full_attention", "sliding_attention", "1", "true"]
NODES = [
  None,
  True,
  False,
  [],
  {},
  [0],
  [[]],
  [1, 2],
  [None],
  {"a": 1},
  {"factor": 2.0},
  {"rope_type": "yarn"},
  *NUMBERS,
  *TEXTS,
]
TOKENS = [
  b"NaN",
  b"Infinity",
  b"-Infinity",
  b"1e999",
  b"-1e999",
  b"9" * 5000,
  b"[" * 2000,
  b'{"a":' * 2000,
  b"\xff",
  b"\xef\xbb\xbf",
]
TOKENS += [
  b"\0",
  b"true",
  b"null",
  b"{}",
  b"[]",
  b'"',
  b"'",
  b",",
  b":",
  b"}",
  b"]",
  b"//",
  b"\\u0000",
  b"1.",
  b"-",
  b"1e",
]
LENGTHS = [
  0,
  1,
  2,
  7,
  8,
  2**16,
  2**24,
  2**24 + 1,
  2**31,
  2**32 - 1,
  2**32,
  2**62,
  2**63 - 1,
  2**63,
  2**64 - 9,
  2**64 - 8,
  2**64 - 1,
]


def nodes(value, path=()):
  """The paths of all that a JSON value is made of."""
  yield path
  items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  for key, each in items:
    yield from nodes(each, (*path, key))


def changed(rng, value, names=TEXTS):
  """A JSON value with one of its nodes replaced, removed, renamed, copied elsewhere or a little off."""
  value = json.loads(json.dumps(value))  # of its own
  path = rng.choice(list(nodes(value))[1:] or [()])
  if not path:
    return rng.choice(NODES)
  *above, last = path
  parent = value
  for key in above:
    parent = parent[key]
  how = rng.randrange(7)
  if how == 0:
    del parent[last]
  elif how == 1 and isinstance(parent, dict):
    parent[rng.choice([*names, f"{last}s", str(last)[:-1]])] = parent.pop(last)
  elif how == 2 and isinstance(parent, dict):
    parent[rng.choice([*names, *parent])] = rng.choice([parent[last], rng.choice(NODES)])
  elif how == 3 and isinstance(parent[last], (int, float)) and not isinstance(parent[last], bool):
    parent[last] += rng.choice([-1, 1, 0.5, parent[last]])
  elif how == 4:
    parent[last] = [parent[last]] * rng.choice([1, 2, 3, 9])
  elif how == 5:
    inner = parent[last]
    for _ in range(rng.choice([1, 30, 100])):
      inner = rng.choice([[inner], {"a": inner}])
    parent[last] = inner
  else:
    parent[last] = rng.choice(NODES)
  return value


def flipped(rng, data):
  """Bytes with some flipped, inserted, cut off, doubled or added."""
  data = bytearray(data)
  how = rng.randrange(6)
  at = rng.randrange(len(data) + 1)
  if how == 0:
    for _ in range(rng.choice([1, 1, 2, 8])):
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  elif how == 1:
    data[at:at] = rng.choice(TOKENS)
  elif how == 2:
    del data[at:]
  elif how == 3:
    data += rng.randbytes(rng.choice([1, 8, 100]))
  elif how == 4:
    end = at + rng.randrange(40)
    data[at:at] = data[at:end]
  else:
    end = at + rng.randrange(1, 20)
    data[at:end] = rng.choice(TOKENS)
  return bytes(data)


def twice(rng, text):
  """JSON of an object in which a key is twice."""
  plain = json.loads(text)
  if not isinstance(plain, dict) or not plain:
    return text
  key = rng.choice(list(plain))
  return text.rstrip()[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice(NODES))}}}"


def header_case(rng, plain, data):
  """A safetensors file made of a good header and its data."""
  for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
    plain = changed(rng, plain)
  text = json.dumps(plain)
  text = (twice(rng, text) if rng.random() < 0.05 else text).encode()
  if rng.random() < 0.3:
    text = flipped(rng, text)
  length = len(text)
  if rng.random() < 0.15:
    length = rng.choice([*LENGTHS, length - 1, length + 1, length + len(data), rng.randrange(2**64)]) % 2**64
  out = length.to_bytes(8, "little") + text + data
  return flipped(rng, out) if rng.random() < 0.3 else out


def config_case(rng, settings):
  """A config.json made of good ones: of one family, at times with a setting of another."""
  plain, other = rng.choice(settings), rng.choice(settings)
  for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
    plain = changed(rng, plain, [*TEXTS, *other])
    if isinstance(plain, dict) and rng.random() < 0.2:
      plain = plain | dict(rng.sample(list(other.items()), 1))
  text = json.dumps(plain)
  text = (twice(rng, text) if rng.random() < 0.05 else text).encode()
  return flipped(rng, text) if rng.random() < 0.3 else text


def run(count, seed, make, read):
  """What came of `count` cases: {"loaded" or the reason of an error: how many}.

  Anything but a JaxllmError comes out, with the seed and the number of its case.  A case may take a second, and all of them
  together 200 MB more memory than there was.
  """
  outcomes, slowest, before = collections.Counter(), (0.0, 0), peak()
  for i in range(count):
    data = make(random.Random(f"{seed}/{i}"))
    start = time.thread_time()
    try:
      read(data)
      outcome = "loaded"
    except JaxllmError as e:
      outcome = reason(str(e))
      assert len(str(e)) < 20_000, f"seed {seed}, case {i}: a message of {len(str(e))} characters"
    except BaseException as e:
      raise AssertionError(
        f"seed {seed}, case {i}: {type(e).__name__}: {str(e)[:300]}\n{data[:2000]!r}"
      ) from e
    outcomes[outcome] += 1
    slowest = max(slowest, (time.thread_time() - start, i))
  grown = peak() - before
  print(
    f"\nseed {seed}: {count:,} cases, the slowest {1e3 * slowest[0]:.0f} ms (case {slowest[1]}), {grown >> 20} MB more memory"
  )
  for outcome, number in outcomes.most_common(25):
    print(f"{number:7,}  {outcome}")
  if len(outcomes) > 25:
    print(
      f"{sum(outcomes.values()) - sum(n for _, n in outcomes.most_common(25)):7,}  of {len(outcomes) - 25} other kinds"
    )
  assert slowest[0] < 1, slowest
  assert grown < 200 << 20
  return outcomes


def peak():
  """Bytes of memory that this process had at most."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reason(message):
  """A message without what is of the case: names, values and numbers."""
  text = re.sub(r"^\S+(config\.json|safetensors): ", "", message.partition("\n")[0])
  text = re.sub(
    r"(found|names?|unknown settings, which could change the model:) .*?(, expected|, but a|$)",
    r"\1 ...\2",
    text,
  )
  text = re.sub(r"expected (one of|some of) .*", r"expected \1 ...", text)
  text = re.sub(r"'.*?'|\[.*?\]|\(.*?\)|[0-9][0-9,.]*", "*", text)
  return re.sub(r"^[\w.*]+: ", "*: ", text)[:70]
