"""What a row's text depends on: prompt, key, sampler and stop ids; not its batch, not the chunk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_table import same_text

from jaxllm.generate.loop import generate
from jaxllm.nn import Transformer
from jaxllm.sampling import Chain, Greedy, RepetitionPenalty, Temperature, TopK, TopP
from jaxllm.sampling.base import as_pytree

core = pytest.mark.core
NEW = 20
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def text(shallow, prompts):
  """text(**arguments): the tokens of a call with whatever differs from a sampled one."""
  model, params = shallow
  usual = {
    "model": model,
    "prompts": prompts,
    "params": params,
    "sampler": Temperature(1.0),
    "key": KEY,
    "max_new_tokens": NEW,
  }
  return lambda **arguments: generate(**(usual | arguments))


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=core), 1.0])
def test_a_row_does_not_depend_on_its_batch(text, prompts, temperature):
  # together a bucket of 32, the first and last alone of 16
  ragged = [prompts[0], list(range(30)), prompts[2]]
  key_B, sampler = jax.random.split(KEY, 3), Temperature(temperature)
  together = text(prompts=ragged, key=key_B, sampler=sampler).tokens
  for row in (0, 2):
    alone = text(prompts=ragged[row : row + 1], key=key_B[row : row + 1], sampler=sampler)
    same_text("a longer prompt beside it, another bucket", alone.tokens, [together[row]])
  order = [2, 0, 1]
  moved = text(prompts=[ragged[row] for row in order], key=key_B[jnp.array(order)], sampler=sampler)
  same_text("the order of the batch", moved.tokens, [together[row] for row in order])


def test_the_text_does_not_depend_on_the_chunk(text):
  usual = text()
  found = text(chunk=7)  # three chunks, the last of which is cut short
  assert found == usual
  same_text("the chunk", found.tokens, usual.tokens)
  for index in (0, 6, 7, 8):  # the first token, and those about the end of the first chunk
    stops = [tokens[index] for tokens in usual.tokens]
    found, expected = text(chunk=7, stop_ids=stops), text(stop_ids=stops)
    assert found == expected != usual
    same_text("the chunk, with stop ids", found.tokens, expected.tokens)


def test_a_single_candidate_is_greedy(text):
  greedy, sampled = text(sampler=Greedy(), key=None), text()
  assert sampled != greedy
  assert text(sampler=Temperature(0.0)) == greedy
  assert text(sampler=TopK([1, 1, 1])) == greedy
  assert text(sampler=TopK([0, 0, 0])) == sampled
  mixed = text(sampler=TopK([1, 0, 1])).tokens  # a parameter a row
  assert mixed == [greedy.tokens[0], sampled.tokens[1], greedy.tokens[2]]


@core
def test_the_same_key_gives_the_same_text_and_another_key_another(text, prompts):
  assert text() == text() == text(key=jax.random.PRNGKey(7))
  assert text(key=jax.random.key(8)) != text()
  assert len(set(map(tuple, text(prompts=prompts[:1] * 3).tokens))) == 3  # rows of one call draw apart
  assert text(prompts=np.array([prompts[0]] * 3)) == text(prompts=[tuple(prompts[0])] * 3)


def test_each_token_is_drawn_with_the_key_of_its_row_and_step(text, shallow):
  uniform = jax.tree.map(np.zeros_like, shallow[1])
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  key_BT = jax.vmap(fold, in_axes=(0, None))(fold(KEY, jnp.arange(3)), jnp.arange(NEW))
  expected, _ = Temperature(1.0)(key_BT.reshape(-1), jnp.zeros((3 * NEW, 64)), ())
  assert text(params=uniform).tokens == expected.reshape(3, NEW).tolist()


def cut(tokens, stops):
  """(tokens up to the first stop id and with it, the reason)."""
  at = next((i for i, token in enumerate(tokens) if token in stops), None)
  return (tokens, "length") if at is None else (tokens[: at + 1], "stop")


STOPS = [  # for the usual text: (row, index) of each stop id
  pytest.param([(0, 6)], marks=core),
  [(1, 0)],
  [(2, NEW - 1)],
  [(0, 2), (1, 9)],
  [(0, 0), (1, 0), (2, 0)],
]


@pytest.mark.parametrize("places", STOPS)
def test_a_stop_id_ends_its_row_and_no_other(text, places):
  usual = text()
  stops = [usual.tokens[row][index] for row, index in places]
  out = text(stop_ids=stops)
  assert list(zip(out.tokens, out.reasons, strict=True)) == [cut(tokens, stops) for tokens in usual.tokens]
  assert "stop" in out.reasons


def test_the_ids_of_the_config_stop_by_default(text, shallow):
  """And given ones replace them: () none at all."""
  model, usual = shallow[0], text()
  stops = (usual.tokens[0][6], usual.tokens[1][2])
  ending = Transformer(dataclasses.replace(model.cfg, eos_ids=stops))
  assert text(model=ending) == text(stop_ids=stops) != usual
  assert text(model=ending, stop_ids=()) == usual
  assert text(model=ending, stop_ids=stops[:1]) == text(stop_ids=stops[:1])


def test_without_stop_ids_every_row_reaches_its_length(text):
  assert text(stop_ids=()) == text(stop_ids=None) == text()
  assert text().reasons == ["length"] * 3
  assert text(max_new_tokens=1).tokens == [tokens[:1] for tokens in text().tokens]


@as_pytree
@dataclasses.dataclass(frozen=True)
class Counted(Greedy):
  """Greedy, counting its draws in the state and reporting each."""

  seen = []  # noqa: RUF012 (what the test reads; the sampler itself has no state)

  def init(self, tokens, lengths, room=0):
    return jnp.int32(0)

  def update(self, tokens_B, state, logits_BV):
    jax.debug.callback(lambda count: self.seen.append(int(count)), state, ordered=True)
    return state + 1


def test_the_loop_ends_with_the_last_row_and_the_samplers_state_moves_on(text):
  greedy = text(sampler=Greedy()).tokens
  stops = {greedy[0][3], greedy[1][5], greedy[2][7]}
  longest = max(len(cut(tokens, stops)[0]) for tokens in greedy)
  assert 4 < longest < NEW
  Counted.seen.clear()
  text(sampler=Counted(), stop_ids=stops, chunk=4)
  jax.effects_barrier()
  # one draw a token, over all chunks, and none after the last row
  assert Counted.seen == list(range(longest))


def span(sizes):
  """In words, from the first to the last."""
  return " to ".join(map(str, dict.fromkeys([sizes[0], sizes[-1]])))


@pytest.mark.parametrize("sizes", [(3, 8), pytest.param(range(2, 17), marks=pytest.mark.slow)])
def test_greedy_text_is_the_same_in_every_place_of_every_batch(text, sizes):
  """Float32: one prompt among others of other lengths, in batches of 2 to 16."""
  rng = np.random.default_rng(3)
  one = rng.integers(0, 64, 11).tolist()
  alone = text(prompts=[one], sampler=Greedy(), key=None).tokens[0]
  assert len(set(alone)) >= 5
  for B in sizes:
    others = [rng.integers(0, 64, n).tolist() for n in rng.integers(1, 16, B - 1)]
    for place in range(B) if B > 8 else {0, B // 2, B - 1}:
      batch = [*others[:place], one, *others[place:]]
      found = text(prompts=batch, sampler=Greedy(), key=None).tokens[place]
      same_text(f"greedy, batches of {span(sizes)}, every place", [found], [alone])


@pytest.mark.parametrize("sizes", [(4,), pytest.param(range(2, 17), marks=pytest.mark.slow)])
def test_sampled_text_is_the_same_in_every_place_of_every_batch(text, sizes):
  """With the row's own key, temperature, top-p and penalty, which the other rows have otherwise."""
  rng = np.random.default_rng(5)
  one, key = rng.integers(0, 64, 11).tolist(), jax.random.key(11)
  own = (0.9, 0.8, 1.3)

  def tokens(batch, key_B, parameters):
    kinds = zip((Temperature, TopP, RepetitionPenalty), np.transpose(parameters), strict=True)
    return text(prompts=batch, key=key_B, sampler=Chain(tuple(kind(values) for kind, values in kinds))).tokens

  alone = tokens([one], key[None], [own])[0]
  for B in sizes:
    others = [rng.integers(0, 64, n).tolist() for n in rng.integers(1, 16, B - 1)]
    theirs = np.stack(
      [rng.choice([0.0, 0.5, 2.0], B - 1), rng.random(B - 1), rng.uniform(1, 2, B - 1)], axis=1
    )
    keys = jax.random.split(jax.random.key(B), B - 1)
    for place in range(B):
      batch, parameters = [*others[:place], one, *others[place:]], np.insert(theirs, place, own, axis=0)
      key_B = jnp.concatenate([keys[:place], key[None], keys[place:]])
      found = tokens(batch, key_B, parameters)[place]
      same_text(f"sampled, batches of {span(sizes)}, every place", [found], [alone])
