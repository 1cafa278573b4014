"""What a caller can get wrong, and what the message says of it."""

import generation_table
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compilations
from method_cases import learned

from jaxllm.errors import ConfigError, DataError, SamplingError, TokenizerError
from jaxllm.generate.loop import generate
from jaxllm.nn import Transformer
from jaxllm.sampling import SAMPLERS, LogitBias, Temperature

core = pytest.mark.core
KEY = jax.random.key(0)
ID = "expected an integer from 0 to 63"
COUNT = "expected an integer of at least 1"

WRONG = [  # arguments, error, message
  pytest.param(
    {"prompts": []}, DataError, r"prompts: found none, expected a list of at least one", marks=core
  ),
  ({"prompts": [[1], []]}, DataError, r"prompts\[1\]: found an empty prompt, expected at least one id"),
  ({"prompts": [1, 2]}, DataError, r"prompts\[0\]: found 1, expected a list of ids"),
  ({"prompts": "ab"}, DataError, r"prompts: found 'ab', expected a list of lists of ids"),
  ({"prompts": None}, DataError, r"prompts: found None, expected a list of lists of ids"),
  ({"prompts": np.array([1, 2])}, DataError, r"prompts\[0\]: found np.int64\(1\), expected a list of ids"),
  ({"prompts": ["ab"]}, DataError, r"prompts\[0\]: found 'ab', expected a list of ids"),
  ({"prompts": [[1], None]}, DataError, r"prompts\[1\]: found None, expected a list of ids"),
  pytest.param(
    {"prompts": [[1], [2, -1]]}, TokenizerError, rf"prompts\[1\]\[1\]: found -1, {ID}", marks=core
  ),
  ({"prompts": [[63, 64]]}, TokenizerError, rf"prompts\[0\]\[1\]: found 64, {ID}"),
  ({"prompts": [[2**70]]}, TokenizerError, rf"prompts\[0\]\[0\]: found {2**70}, {ID}"),
  ({"prompts": [[1, 2.0]]}, TokenizerError, rf"prompts\[0\]\[1\]: found 2.0, {ID}"),
  ({"prompts": [[True]]}, TokenizerError, rf"prompts\[0\]\[0\]: found True, {ID}"),
  ({"prompts": [["1"]]}, TokenizerError, rf"prompts\[0\]\[0\]: found '1', {ID}"),
  ({"prompts": [[[1, 2]]]}, TokenizerError, rf"prompts\[0\]\[0\]: found \[1, 2\], {ID}"),
  ({"prompts": np.array([[0.5]])}, TokenizerError, rf"prompts\[0\]\[0\]: found 0.5, {ID}"),
  ({"prompts": np.array([[1, 64]])}, TokenizerError, rf"prompts\[0\]\[1\]: found 64, {ID}"),
  ({"prompts": [np.array([True])]}, TokenizerError, rf"prompts\[0\]\[0\]: found True, {ID}"),
  (
    {"prompts": [[np.float32(2)]]},
    TokenizerError,
    rf"prompts\[0\]\[0\]: found np.float32\(2.0\), {ID}",
  ),
  pytest.param({"max_new_tokens": 0}, ConfigError, rf"max_new_tokens: found 0, {COUNT}", marks=core),
  ({"max_new_tokens": -3}, ConfigError, rf"max_new_tokens: found -3, {COUNT}"),
  ({"max_new_tokens": 1.5}, ConfigError, rf"max_new_tokens: found 1.5, {COUNT}"),
  ({"max_new_tokens": True}, ConfigError, rf"max_new_tokens: found True, {COUNT}"),
  ({"max_new_tokens": None}, ConfigError, rf"max_new_tokens: found None, {COUNT}"),
  ({"max_new_tokens": 2**40}, ConfigError, rf"max_new_tokens: found {2**40}, expected at most 2147483647"),
  ({"chunk": 1.0}, ConfigError, rf"chunk: found 1.0, {COUNT}"),
  ({"part": 0}, ConfigError, rf"part: found 0, {COUNT}"),
  ({"chunk": 0}, ConfigError, rf"chunk: found 0, {COUNT}"),
  ({"stop_ids": (1, 64)}, TokenizerError, rf"stop_ids\[1\]: found 64, {ID}"),
  ({"stop_ids": (-1,)}, TokenizerError, rf"stop_ids\[0\]: found -1, {ID}"),
  ({"stop_ids": (None,)}, TokenizerError, rf"stop_ids\[0\]: found None, {ID}"),
  ({"stop_ids": 3}, ConfigError, r"stop_ids: found 3, expected a tuple of ids"),
  ({"stop_ids": np.int64(3)}, ConfigError, r"stop_ids: found np.int64\(3\), expected a tuple of ids"),
  ({"stop_ids": [[1]]}, TokenizerError, rf"stop_ids\[0\]: found \[1\], {ID}"),
  ({"stop_ids": "</s>"}, ConfigError, r"stop_ids: found '</s>', expected a tuple of ids"),
  ({"sampler": "greedy"}, SamplingError, r"sampler: found 'greedy', expected a value such as"),
  (
    {"sampler": SAMPLERS["greedy"]},
    SamplingError,
    r"sampler: found <class .*Greedy'>, expected a value such as",
  ),
  (
    {"sampler": Temperature([1.0, 0.5]), "key": KEY},
    SamplingError,
    r"parameter has shape \(2,\), the logits have 1 rows",
  ),
  pytest.param(
    {"sampler": Temperature(1.0)}, ConfigError, r"key: found None, expected jax.random.key", marks=core
  ),
  (
    {"key": 0},
    ConfigError,
    r"key: found 0, expected jax.random.key\(seed\), or a key for each of the 1 rows",
  ),
  ({"key": jnp.zeros(2)}, ConfigError, r"key: found .*, expected jax.random.key"),
  (
    {"key": jax.random.split(KEY, 6).reshape(2, 3)},
    ConfigError,
    r"key: found (.|\n)*, or a key for each of the 1 rows",
  ),
  ({"rope": 3}, ConfigError, r"rope: found 3, expected the tables of cfg.rope_tables\(\)"),
  ({"store": "int8"}, ConfigError, r"store: found 'int8', expected a value such as STORES\[name\], .*'int4'"),
  ({"stop": "###"}, ConfigError, r"stop: found '###', expected None or a function"),
  ({"on_tokens": []}, ConfigError, r"on_tokens: found \[\], expected None or a function"),
  ({"logprobs": 65}, ConfigError, r"logprobs: found 65, expected None or an integer from 0 to 64"),
  (
    {"sampler": LogitBias(np.zeros(63)), "key": KEY},
    SamplingError,
    r"table of tokens has shape \(63,\), the logits have shape \(1, 64\); give one value a token",
  ),
  (
    {"key": jax.random.split(KEY, 3)},
    ConfigError,
    r"key: found (.|\n)*, or a key for each of the 1 rows",
  ),
]


@pytest.fixture(scope="module")
def right(shallow):
  """A call that is right; another then compiles nothing that is not its own."""
  model, params = shallow
  usual = {"prompts": [[1, 2]], "max_new_tokens": 4}
  generate(model, params, **usual)
  return usual


def refused(row, error, message, call):
  """A call is refused for that reason, and compiles nothing before."""
  generation_table.about("bad input", row)
  with compilations() as seen, pytest.raises(error, match=message) as caught:
    call()
  assert not seen
  generation_table.refused(row, caught.value, compiled=len(seen))


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_a_wrong_argument_is_refused_and_named(shallow, right, arguments, error, message):
  row = " ".join(", ".join(f"{name}={value!r}" for name, value in arguments.items()).split())
  refused(
    row if len(row) < 60 else f"{row[:56]} ...",
    error,
    message,
    lambda: generate(*shallow, **right | arguments),
  )


def test_more_positions_than_a_learned_table_has_are_refused(shallow, right):
  cfg = shallow[0].cfg.with_position("learned", max_length=16)
  params = shallow[1] | learned(cfg)
  text = lambda new: generate(Transformer(cfg), params, [[1], [1, 2, 3]], max_new_tokens=new, stop_ids=())
  message = r"longest prompt and max_new_tokens: found 17, expected at most max_length = 16"
  refused("a prompt of 3, 14 new tokens, a learned table of 16", ConfigError, message, lambda: text(14))
  assert [len(new) for new in text(13).tokens] == [13, 13]
  at = lambda last: generate(
    Transformer(cfg), params, [[1, 2]], max_new_tokens=4, stop_ids=(), positions=[[0, last]]
  )
  message = r"largest position and max_new_tokens: found 17, expected at most max_length = 16"
  refused(
    "a prompt whose last position is 12, 4 new tokens, 16 positions", ConfigError, message, lambda: at(12)
  )


def test_tables_whose_rows_may_end_before_the_cache_are_refused(shallow):
  model, params = shallow
  rope = model.cfg.with_position("dynamic_ntk", factor=2.0).rope_tables(max_len=14)
  with pytest.raises(ConfigError, match=r"rope: found a table of 3 rows, expected one; leave rope out"):
    generate(model, params, [[1, 2]], max_new_tokens=4, rope=rope)


UNUSABLE = [
  pytest.param(np.s_[0, 5], np.nan, id="a NaN", marks=core),
  pytest.param(np.s_[0], np.inf, id="all infinite"),
  pytest.param(np.s_[0], -np.inf, id="all infinite, of the other sign"),
]


@pytest.mark.parametrize(("where", "value"), UNUSABLE)
def test_logits_that_nothing_can_be_drawn_from_are_refused(shallow, prompts, where, value):
  model, params = shallow
  head = np.zeros_like(params["head"])
  head[where] = value  # the logits are the first coordinate of the hidden state times this
  told = []
  with pytest.raises(
    SamplingError, match=r"^row 0: found NaN, \+inf or nothing finite in .* new token 0, "
  ) as caught:
    generate(
      model,
      params | {"head": head},
      prompts,
      max_new_tokens=10_000,
      chunk=1,
      on_tokens=lambda *x: told.append(x),
    )
  assert len(told) <= 2 * len(prompts)  # the loop ended
  generation_table.refused(f"weights with {value}", caught.value)


@pytest.fixture
def broken(shallow, prompts):
  """(row, index, id, params): an id in no prompt that `row` alone draws first, and weights that it breaks."""
  model, params = shallow
  text = generate(model, params, prompts, max_new_tokens=20).tokens
  for index in range(1, 19):
    for row, tokens in enumerate(text):
      before = {token for ids in [*prompts, *(ids[:index] for ids in text)] for token in ids}
      others = {ids[index] for at, ids in enumerate(text) if at != row}
      if tokens[index] not in before | others:
        embed = params["embed"].copy()
        embed[tokens[index]] = np.nan
        return row, index, tokens[index], params | {"embed": embed}
  raise AssertionError("every row repeats itself: choose another seed")


@core
def test_the_row_and_the_token_that_failed_are_named(shallow, prompts, broken):
  row, index, _, params = broken
  message = rf"^row {row}: .* in the logits of new token {index + 1}, .* dtype = float32"
  with pytest.raises(SamplingError, match=message):
    generate(shallow[0], params, prompts, max_new_tokens=20)
  out = generate(shallow[0], params, prompts, max_new_tokens=index + 1)  # drawn last, and never read
  assert [len(tokens) for tokens in out.tokens] == [index + 1] * 3


@core
def test_a_row_that_has_ended_cannot_fail(shallow, prompts, broken):
  row, _, token, params = broken
  expected = generate(*shallow, prompts, max_new_tokens=20, stop_ids=(token,))
  assert expected.reasons[row] == "stop" and "length" in expected.reasons
  assert generate(shallow[0], params, prompts, max_new_tokens=20, stop_ids=(token,)) == expected
