"""What differs in data alone compiles no search again: penalties, ids, parameters of samplers and drafts, numbers of tokens."""

import jax
import pytest
from compiled import compilations

from jaxllm.generate import beam, contrastive, speculative
from jaxllm.generate.draft import DraftModel, PromptLookup
from jaxllm.sampling import TopK

PROMPTS = [[1, 2, 3], [4]]
ALL = [{"prompts": [[7] * 16, [9]]}, {"max_new_tokens": 40}, {"stop_ids": (5,)}]


def check(call, usual, others):
  with compilations() as seen:
    call(**usual)
  assert seen
  for other in [*others, *ALL]:
    with compilations() as seen:
      call(**usual | other)
    assert not seen, other


@pytest.mark.parametrize("kind", [PromptLookup, DraftModel])
def test_speculative_decoding(shallow, kind):
  model, params = shallow
  usual = {"prompts": PROMPTS, "max_new_tokens": 9, "stop_ids": ()}
  usual |= {"sampler": TopK([3, 4]), "key": jax.random.key(0)}
  others = [{"sampler": TopK([7, 2]), "key": jax.random.key(1)}]
  if kind is PromptLookup:
    usual["draft"] = PromptLookup(2)
  else:
    usual["draft"] = DraftModel(model, params)
    others.append({"draft": DraftModel(model, jax.tree.map(lambda x: 2 * x, params))})
  check(lambda **given: speculative.generate(model, params, **given), usual, others)


@pytest.mark.parametrize(
  ("search", "own", "others"),
  [
    pytest.param(
      beam.generate,
      {"num_beams": 3},
      [{"length_penalty": 0.3}, {"diversity_penalty": 1}, {"num_return": 3}],
      marks=pytest.mark.core,
    ),
    (contrastive.generate, {"top_k": 3}, [{"alpha": 0.3}, {"alpha": 1}]),
  ],
)
def test_searches(shallow, search, own, others):
  usual = {"prompts": PROMPTS, "max_new_tokens": 9, "stop_ids": ()} | own
  check(lambda **given: search(*shallow, **given), usual, others)
