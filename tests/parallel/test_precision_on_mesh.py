"""Loss scaling on eight devices: one flag for all, and the steps of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from mesh_cases import CASES, params
from mesh_checks import make_mesh, tokens

from jaxllm import parallel, tree
from jaxllm.nn import Transformer
from jaxllm.train import step
from jaxllm.train.loss_scale import LossScale
from jaxllm.train.precision import POLICIES, Policy

CFG = dataclasses.replace(CASES["llama"], num_layers=1)


def bytes_of(state):
  return {
    jax.tree_util.keystr(path): np.asarray(x).tobytes()
    for path, x in jax.tree_util.tree_leaves_with_path(state)
  }


def test_the_flag_is_one_for_all_devices(monkeypatch):
  """A gradient that is infinite on one device stops the update on all eight."""
  mesh = make_mesh("data=2,tensor=4")
  cfg = CFG
  config = step.TrainConfig(10, 8, 12, warmup=0.0, precision=Policy(loss_scale=LossScale()))
  with jax.set_mesh(mesh):
    place = lambda values: parallel.shard(values, mesh, parallel.RULES["tensor"], cfg)
    weights = place(params(cfg))
    for bad in (None, 0, -1):
      flat = {path: np.ones(x.shape, np.float32) for path, x in tree.flatten(params(cfg)).items()}
      if bad is not None:
        flat["layers/0/mlp/up/w"][0, bad] = np.inf
      grads = place(tree.unflatten(flat))
      shards = [
        not np.all(np.isfinite(s.data)) for s in tree.flatten(grads)["layers/0/mlp/up/w"].addressable_shards
      ]
      assert sum(shards) == (0 if bad is None else 2)  # one of four, on both halves of the batch
      monkeypatch.setattr(step, "make_gradient", lambda *_, grads=grads: lambda *_: (jnp.float32(1), grads))
      state = step.init_state(Transformer(cfg), config, 0, jax.tree.map(jnp.copy, weights))
      before = bytes_of(state)
      state, _ = step.make_step(Transformer(cfg), config)(state, parallel.shard_batch(tokens(cfg), mesh))
      after = bytes_of(state)
      for path in before:
        if path.startswith(("['params']", "['opt']")):
          assert (before[path] == after[path]) == (bad is not None), path
      assert float(state["loss_scale"]["scale"]) == (2.0**16 if bad is None else 2.0**15)


def test_a_mesh_skips_and_steps_as_one_device_does():
  cfg = CFG
  policy = dataclasses.replace(POLICIES["O2"], loss_scale=LossScale(2.0**22))
  config = step.TrainConfig(20, 8, 12, warmup=0.0, precision=policy, accumulate=2)
  run = step.make_step(Transformer(cfg), config)

  def losses(place, ids):
    state, found = step.init_state(Transformer(cfg), config, 0, place(params(cfg))), []
    for _ in range(12):
      state, loss = run(state, ids)
      found.append((float(loss), float(state["loss_scale"]["scale"])))
    return np.array(found).T

  one = losses(lambda p: jax.tree.map(jnp.asarray, p), tokens(cfg))
  mesh = make_mesh("data=2,tensor=4")
  with jax.set_mesh(mesh):
    place = lambda p: parallel.shard(p, mesh, parallel.RULES["tensor"], cfg)
    eight = losses(place, parallel.shard_batch(tokens(cfg), mesh))
  np.testing.assert_array_equal(eight[1], one[1])
  assert one[1, -1] < 2.0**22 and one[0, -1] < one[0, 0]
  np.testing.assert_allclose(eight[0], one[0], rtol=2e-3)  # sums of float16 in another order
