"""What the property tests share: their settings, and strategies of numbers and of RoPE methods.

Values are drawn freely and shapes from short lists, so that a few compiled programs serve all examples.
"""

import functools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxllm.position import POSITIONS

LAST = 2**31 - 1
PAIRS = (2, 4, 8)
"""Half of each rotary_dim that is drawn: a table, and so a program, each."""


def examples(count):
  """The same examples on every run, and no limit on the time of one, the first of which compiles."""
  return settings(max_examples=count, deadline=None, derandomize=True)


def numbers(shape, largest=100.0):
  """float32 arrays with nothing between 0 and 1e-30, so that moderate products are not subnormal: XLA makes those 0."""
  elements = st.floats(-largest, largest, width=32)
  return hnp.arrays(np.float32, shape, elements=elements).map(
    lambda x: np.where(np.abs(x) < 1e-30, np.float32(0), x)
  )


bases = st.floats(1.01, 1e8)
factors = st.floats(0.25, 128.0)
lengths = st.integers(2, 2**20)


def fields_of(name, pairs):
  """A strategy of all fields of a RoPE scaling but its base, factor and original_length; {} where it has no others."""
  lists = st.lists(st.floats(0.5, 64.0), min_size=pairs, max_size=pairs)
  slow_fast = st.tuples(st.floats(0.01, 1.0), st.floats(1.5, 64.0))
  return st.fixed_dictionaries(
    {
      "ntk_mixed": dict(exponent=st.floats(0.0, 1.0)),
      "ntk_by_parts": dict(beta_turns=slow_fast, gamma_turns=slow_fast),
      "llama3": dict(low_freq_factor=st.floats(0.1, 2.0), high_freq_factor=st.floats(2.5, 64.0)),
      "yarn": dict(
        beta_slow=st.floats(0.01, 2.0),
        beta_fast=st.floats(2.5, 64.0),
        truncate=st.booleans(),
        mscale=st.floats(0.1, 2.0),
      ),
      "longrope": dict(short_factor=lists, long_factor=lists),
    }.get(name, {})
  )


SCALINGS = (
  *("pi", "ntk_old", "ntk", "ntk_fixed", "ntk_mixed", "ntk_by_parts"),
  *("dynamic_ntk", "yarn", "longrope", "llama3", "proportional"),
)


@st.composite
def scalings(draw, pairs, **given):
  """Any RoPE or scaling of it, with fields that are drawn but for those given."""
  name = draw(st.sampled_from(("rope", *SCALINGS)))
  fields = dict(base=draw(bases), original_length=draw(lengths)) | draw(fields_of(name, pairs))
  if name != "rope":
    fields |= dict(factor=draw(factors))
  return functools.partial(POSITIONS[name], **fields)(**given)
