"""A run that is cut ends in the same bytes; damaged, foreign and diverged states are told apart."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases

from jaxllm.errors import CheckpointError
from jaxllm.nn import Transformer
from jaxllm.train import loop
from jaxllm.train.checkpoint import Checkpoints, restore_tree

STEPS = 20
# A restore that fails inside Orbax leaves callbacks for an event loop that is closed by then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
  monkeypatch.setattr(loop, "make_step", train_cases.compiled_step)
  monkeypatch.setattr(loop, "init_state", train_cases.first_state)


class Cut(BaseException):
  """Ends a run where it asks whether to stop."""


def cut():
  raise Cut


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """(the directory of a run that nothing disturbed, the bytes of its state)."""
  directory = tmp_path_factory.mktemp("straight")
  return directory, train_cases.bytes_of(train_cases.train(directory, STEPS)[0])


@pytest.mark.parametrize("at", [1, pytest.param(7, marks=pytest.mark.core), 19])
def test_a_run_that_was_cut_ends_in_the_same_bytes(tmp_path, monkeypatch, straight, at):
  with monkeypatch.context() as patch, pytest.raises(Cut):
    patch.setattr(loop, "SAVE_EVERY", at)
    train_cases.train(tmp_path, STEPS, check_stop=cut)
  state, starts = train_cases.train(tmp_path, STEPS)
  assert starts == [at]
  assert train_cases.bytes_of(state) == straight[1]


def test_a_finished_run_is_read_and_not_trained(straight):
  stepped = []
  state, starts = train_cases.train(straight[0], STEPS, on_step=lambda step, loss: stepped.append(step))
  assert starts == [STEPS] and not stepped
  assert train_cases.bytes_of(state) == straight[1]


# One state is saved as steps 10, 20 and 30, its parameters moved by the step; tests work on copies.
@pytest.fixture(scope="module")
def template():
  return train_cases.first_state(Transformer(train_cases.CFG), train_cases.config(STEPS), 0)


def marked(template, step):
  return template | {
    "step": jnp.int32(step),
    "params": jax.tree.map(lambda leaf: leaf + step, template["params"]),
  }


@pytest.fixture(scope="module")
def saved(tmp_path_factory, template):
  directory = tmp_path_factory.mktemp("saved")
  with Checkpoints(directory) as checkpoints:
    for step in (10, 20, 30):
      checkpoints.save(step, marked(template, step))
    assert checkpoints.steps == [20, 30]  # the newest two are kept
  return directory


@pytest.fixture
def run(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "run")


def files_of(step_directory):
  return sorted(path for path in step_directory.rglob("*") if path.is_file())


def restore(directory, target):
  with Checkpoints(directory) as checkpoints:
    return checkpoints.restore(target)


def test_nothing_saved_is_nothing_restored(tmp_path, template):
  assert restore(tmp_path, template) is None


def test_a_state_comes_back_bit_for_bit(run, template):
  assert train_cases.bytes_of(restore(run, template)) == train_cases.bytes_of(marked(template, 30))


def test_a_damaged_step_is_moved_aside_and_the_one_before_is_used(run, template):
  data = max(files_of(run / "30"), key=lambda path: path.stat().st_size)
  data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
  assert train_cases.bytes_of(restore(run, template)) == train_cases.bytes_of(marked(template, 20))
  assert not (run / "30").exists()
  assert (run / "quarantine" / "30").is_dir()
  with Checkpoints(run) as checkpoints:  # and the run can save that step again
    checkpoints.save(30, marked(template, 30))
  assert int(restore(run, template)["step"]) == 30


def test_no_truncated_file_gives_a_wrong_state(saved, tmp_path, template):
  good = [train_cases.bytes_of(marked(template, step)) for step in (30, 20)]
  fallen = 0
  for i, path in enumerate(files_of(saved / "30")):
    run = shutil.copytree(saved, tmp_path / str(i))
    file = run / path.relative_to(saved)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    found = train_cases.bytes_of(restore(run, template))
    assert found in good, path.name
    fallen += found == good[1]
  assert fallen


def test_all_damaged_is_an_error(run, template):
  for path in [*files_of(run / "20"), *files_of(run / "30")]:
    path.write_bytes(path.read_bytes()[:7])
  with pytest.raises(CheckpointError, match=r"\[20, 30\] can be read") as e:
    restore(run, template)
  assert str(run) in str(e.value)


@pytest.mark.parametrize(
  ("other", "named"),
  [
    pytest.param(
      lambda state: (
        state | {"params": {**state["params"], "head": state["params"]["head"].astype(jnp.bfloat16)}}
      ),
      ["params/head", "float32[16, 256]", "bfloat16[16, 256]"],
      id="dtype",
    ),
    pytest.param(
      lambda state: state | {"params": {**state["params"], "embed": jnp.zeros((256, 24))}},
      ["params/embed", "float32[256, 16]", "float32[256, 24]"],
      id="shape",
    ),
    pytest.param(
      lambda state: state | {"params": {**state["params"], "extra": jnp.zeros(3)}},
      ["params/extra: found nothing, expected float32[3]"],
      id="missing",
    ),
    pytest.param(
      lambda state: state | {"params": {k: v for k, v in state["params"].items() if k != "embed"}},
      ["params/embed: not expected"],
      id="unexpected",
    ),
  ],
)
def test_a_state_of_another_model_is_refused_by_name_and_stays(run, template, other, named):
  with pytest.raises(CheckpointError) as e:
    restore(run, other(template))
  for words in (str(run), "step 30", *named):
    assert words in str(e.value)
  assert (run / "30").is_dir() and not (run / "quarantine").exists()


def test_a_step_is_saved_once(run, template):
  with Checkpoints(run) as checkpoints, pytest.raises(CheckpointError, match="step 30 was not saved"):
    checkpoints.save(30, template)


def test_reading_without_a_model(run, template, tmp_path, caplog):
  step, state = restore_tree(run)
  assert step == 30
  np.testing.assert_array_equal(state["params"]["embed"], marked(template, 30)["params"]["embed"])
  (tmp_path / "empty").mkdir()
  for missing in (tmp_path / "absent", tmp_path / "empty"):
    with pytest.raises(CheckpointError, match=str(missing)):
      restore_tree(missing)
  for bad in ("30", "20"):
    for path in files_of(run / bad):
      path.write_bytes(path.read_bytes()[:7])
    if bad == "30":
      caplog.clear()
      step, state = restore_tree(run)
      assert step == 20 and "step 30: cannot be read" in caplog.text
      np.testing.assert_array_equal(state["params"]["embed"], marked(template, 20)["params"]["embed"])
  with pytest.raises(CheckpointError, match="step 20: cannot be read"):
    restore_tree(run)


def finite(directory):
  step, state = restore_tree(directory)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["params"]))
  return step


def poisoned(monkeypatch, bad_step, show_it):
  """Training whose parameters are NaN from `bad_step` on; the loss of that step tells only if `show_it`."""
  make_step = loop.make_step

  def make(*args, **kwargs):
    step_fn = make_step(*args, **kwargs)

    def step(state, tokens):
      state, metrics = step_fn(state, tokens)
      if int(state["step"]) == bad_step:
        state = state | {"params": jax.tree.map(lambda leaf: leaf * jnp.nan, state["params"])}
        metrics = metrics | ({"loss": jnp.nan} if show_it else {})
      return state, metrics

    return step

  monkeypatch.setattr(loop, "make_step", make)


@pytest.mark.parametrize(("bad_step", "show_it"), [(8, True), (8, False), (10, True), (10, False)])
def test_a_state_of_nan_never_replaces_a_good_one(tmp_path, monkeypatch, bad_step, show_it):
  monkeypatch.setattr(loop, "SAVE_EVERY", 5)
  poisoned(monkeypatch, bad_step, show_it)
  with pytest.raises(loop.DivergedError, match="checkpoint before it is kept") as e:
    train_cases.train(tmp_path, STEPS)
  assert str(tmp_path) in str(e.value)
  assert e.value.exit_code == 1
  assert finite(tmp_path) == 5


def test_the_error_of_a_diverged_run_tells_the_step_as_progress_does(tmp_path, monkeypatch):
  shown = {}
  monkeypatch.setattr(loop, "SAVE_EVERY", 5)
  poisoned(monkeypatch, 8, show_it=True)
  with pytest.raises(loop.DivergedError, match="at step 8"):
    train_cases.train(tmp_path, STEPS, on_step=lambda step, loss: shown.update({step: float(loss)}))
  assert np.isfinite(shown[7]) and not np.isfinite(shown[8])


def test_a_learning_rate_far_too_high(tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "SAVE_EVERY", 5)
  with pytest.raises(loop.DivergedError, match="--learning_rate"):
    train_cases.train(tmp_path, STEPS, learning_rate=1e30, warmup=0.9)
  with pytest.raises(loop.DivergedError):  # and again, from where it was
    train_cases.train(tmp_path, STEPS, learning_rate=1e30, warmup=0.9)


def test_a_state_of_a_wider_model_is_not_trained_on(tmp_path):
  train_cases.train(tmp_path, 2)
  with pytest.raises(
    CheckpointError, match=r"layers/0/mlp/gate/w: found float32\[16, 24\], expected float32\[16, 32\]"
  ):
    train_cases.train(tmp_path, 2, cfg=dataclasses.replace(train_cases.CFG, mlp_dim=32))
