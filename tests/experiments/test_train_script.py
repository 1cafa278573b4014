"""experiments.train: what each kind of run learns and leaves, runs that go on, and runs that diverge."""

import csv
import hashlib
import io
import itertools
import json
import math
import re
import shutil
import signal

import jax
import loaded_case
import numpy as np
import pytest
from train_case import QUICK, call, learned, rows, settings_of, write_text

from experiments.training import run, setup
from experiments.training.metrics import COLUMNS, Metrics
from jaxllm import flops, hf, tree
from jaxllm.errors import CheckpointError
from jaxllm.nn import Transformer
from jaxllm.nn.transformer import head
from jaxllm.ops.losses import cross_entropy
from jaxllm.study.progress import Progress
from jaxllm.train import divergence
from jaxllm.train.checkpoint import restore_tree


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
  """(the output of a run, its flags)."""
  out = tmp_path_factory.mktemp("train") / "out"
  args = (*QUICK, f"--text={text}", "--learning_rate=0.02")
  assert call(*args, f"--out={out}") == 0
  return out, args


def digest(directory):
  """SHA-256 of all that the newest checkpoint holds."""
  state = jax.tree_util.tree_leaves_with_path(restore_tree(directory / "checkpoints")[1])
  return {jax.tree_util.keystr(path): hashlib.sha256(leaf.tobytes()).hexdigest() for path, leaf in state}


def test_what_a_run_leaves(whole):
  """Rows every third step, with those of held-out text; CSV has the same; the loss falls; the model reads as it was saved."""
  out, _ = whole
  found = rows(out)
  assert [row["step"] for row in found] == [3, 6, 9, 12] and all(tuple(row) == COLUMNS for row in found)
  assert [row["held_out_loss"] is None for row in found] == [True, False, True, False]
  assert found[0]["learning_rate"] == pytest.approx(
    0.02 * (0.98 * (1 + math.cos(math.pi * 2 / 12)) / 2 + 0.02), rel=1e-5
  )
  assert found[-1]["loss"] < 0.75 * found[0]["loss"] and found[-1]["labels"] == 8 * 16
  with open(out / "metrics.csv") as file:
    sheet = list(csv.DictReader(file))
  assert [{k: float(v) for k, v in row.items() if v} for row in sheet] == [
    {k: v for k, v in row.items() if v is not None} for row in found
  ]
  results = {row["metric"]: row["value"] for row in rows(out, "results.jsonl")}
  assert results["held_out_loss"] == found[-1]["held_out_loss"]
  assert results["bits_per_byte"] == pytest.approx(results["held_out_loss"] / math.log(2))
  assert (out / "loss.png").stat().st_size > 1000
  cfg, params = hf.load(out / "model")
  state = restore_tree(out / "checkpoints")[1]["params"]
  hidden = lambda p: Transformer(cfg).apply({"params": p}, np.arange(16, dtype=np.int32)[None], logits=None)[
    0
  ]
  np.testing.assert_allclose(hidden(params), hidden(state), rtol=1e-5, atol=1e-5)


def test_held_out_text_is_scored_as_evaluation_does(whole, text):
  """The mean of its windows' losses by the model that was written; none of its bytes is in the rows that are trained on."""
  out, args = whole
  made = setup.set_up(settings_of(*args, f"--out={out}"))
  data = made.held_out
  starts = [data.rows.pieces(row)[0][0] for row in range(min(16, len(data.rows)))]
  cut = [made.train.rows.pieces(row)[0] for row in range(len(made.train.rows))]
  assert max(start + size for start, size in cut) <= min(starts)
  ids = np.frombuffer(text.read_bytes(), np.uint8).astype(np.int32)
  cfg, params = hf.load(out / "model")
  losses = []
  for start in starts:
    window = ids[None, start : start + 17]
    hidden, _ = Transformer(cfg).apply({"params": params}, window[:, :-1], logits=None)
    losses.append(np.mean(cross_entropy(hidden, head(cfg, params), window[:, 1:])[0]))
  results = {row["metric"]: row["value"] for row in rows(out, "results.jsonl")}
  assert results["held_out_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_run_that_is_stopped_goes_on_to_the_same_numbers(whole, tmp_path, monkeypatch):
  """Stopped in step 4 and again in step 7: the same rows, checkpoints and files as of the run that was not."""
  out, args = whole
  step, told = run.Watch.step, []

  def stopping(self, number, metrics):
    step(self, number, metrics)
    told.append(number)
    if number in (4, 7) and number not in told[:-1]:
      signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(run.Watch, "step", stopping)
  codes = [call(*args, f"--out={tmp_path / 'cut'}") for _ in range(3)]
  assert codes == [75, 75, 0] and len(told) == 12
  assert learned(tmp_path / "cut") == learned(out)
  assert digest(tmp_path / "cut") == digest(out)
  for name in ("results.jsonl", "model/model.safetensors"):
    assert (tmp_path / "cut" / name).read_bytes() == (out / name).read_bytes()


def test_rows_beyond_the_checkpoint_are_cut(tmp_path):
  with Metrics(tmp_path, 0) as metrics:
    for i in range(1, 6):
      metrics.add({"step": i, "loss": math.nan if i == 4 else 1.0 / i})
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 6, "lo')  # a kill within a line
  with Metrics(tmp_path, 4) as metrics:
    metrics.add({"step": 5, "loss": 0.5})
  found = rows(tmp_path)
  assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
  assert found[3]["loss"] is None and found[4]["loss"] == 0.5
  assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 6
  (tmp_path / "metrics.jsonl").write_text('{"step": "one"}\n')
  with pytest.raises(CheckpointError, match=r"metrics.jsonl, line 1: not a row"):
    Metrics(tmp_path, 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A Llama of bytes whose width a block of 64 divides."""
  cfg = loaded_case.config(embed_dim=64, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=64)
  return loaded_case.save(tmp_path_factory.mktemp("checkpoint") / "model", cfg)


def changed(before, after):
  """Paths of parameters that have other numbers."""
  return {path for path in before if not np.array_equal(before[path], after[path])}


def test_what_tells_a_run_from_others(checkpoint, text, tmp_path):
  """Checkpoints hold no more than factors: those of other weights of the same shapes are another run's."""
  plain = (*QUICK, f"--text={text}")
  lora = (*plain, "--train=lora", "--lora_rank=4")
  other = tmp_path / "other"
  shutil.copytree(checkpoint, other)
  weights = other / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-1] + b"?")
  runs = [
    (*plain, "--eval_share=0.1"),
    plain,
    (*plain, "--scan"),
    (*lora, f"--model={checkpoint}"),
    (*lora, f"--model={checkpoint}", "--lora_alpha=3"),
    (*lora, f"--model={other}", "--noverify"),
  ]
  found = [setup.set_up(settings_of(*args)).identity for args in runs]
  assert all(a != b for a, b in itertools.combinations(found, 2))
  again = setup.set_up(settings_of(*lora, f"--model={checkpoint}", "--save_every=3")).identity
  assert again == found[3]


@pytest.mark.parametrize("train", ["lora", pytest.param("qlora", marks=pytest.mark.slow)])
def test_factors_alone_are_trained_and_kept(checkpoint, text, tmp_path, train):
  """A checkpoint of the run holds factors only, which are small; the model that is written has them added."""
  out = tmp_path / "out"
  args = (*QUICK, f"--model={checkpoint}", f"--text={text}", f"--train={train}", "--lora_rank=4")
  assert call(*args, "--learning_rate=0.02", "--device=v5e", f"--out={out}") == 0
  told = rows(out)[-1]
  assert (
    4 / 9
    < told["mfu"]
    / (told["tokens_per_second"] * flops.count(hf.load_config(checkpoint)[1], 16).model / 197e12)
    < 1
  )
  state = tree.flatten(restore_tree(out / "checkpoints")[1]["params"])
  assert {path.rpartition("/")[2] for path in state} == {"a", "b"} and len(state) == 2 * 14
  before, after = (
    {
      p: np.asarray(x.value.T if hasattr(x, "value") else x)
      for p, x in tree.flatten(hf.load(where)[1]).items()
    }
    for where in (checkpoint, out / "model")
  )
  moved = changed(before, after)
  assert all("/w" in path for path in moved) and len(moved) == 14
  found = rows(out)
  assert found[-1]["loss"] < found[0]["loss"]
  assert call(*args, "--learning_rate=0.02", f"--out={out}") == 0  # nothing is left to do
  assert [row["step"] for row in rows(out)] == [3, 6, 9, 12]


def test_rules_choose_what_is_trained(checkpoint, text, tmp_path):
  args = (*QUICK, f"--model={checkpoint}", f"--text={text}", "--trained=.*/mlp/.+=yes", "--trained=.+=no")
  assert call(*args, f"--out={tmp_path}") == 0
  before, after = (tree.flatten(hf.load(where)[1]) for where in (checkpoint, tmp_path / "model"))
  moved = {
    path
    for path in before
    if not np.array_equal(*(np.asarray(getattr(x[path], "value", x[path])) for x in (before, after)))
  }
  assert moved == {path for path in before if "/mlp/" in path} and len(moved) == 6
  state = restore_tree(tmp_path / "checkpoints")[1]
  assert set(tree.flatten(state["params"])) == moved
  assert not any(
    "attn" in jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state["opt"])
  )


@pytest.mark.parametrize(
  "args",
  [
    ("--objective=glm",),
    pytest.param(
      ("--objective=prefix_lm", "--scan", "--remat=full", "--optimizer=lion"), marks=pytest.mark.slow
    ),
    pytest.param(
      ("--separator=10", "--precision=O2", "--accumulate=2", "--tie_embeddings"), marks=pytest.mark.slow
    ),
    pytest.param(
      ("--position=alibi", "--optimizer=muon", "--schedule=wsd", "--z_loss=1e-4"), marks=pytest.mark.slow
    ),
    pytest.param(("--num_kv_heads=1", "--optimizer=adafactor", "--precision=bf16"), marks=pytest.mark.slow),
  ],
)
def test_other_runs_learn(text, tmp_path, args):
  """GLM's blanks, prefixes, packed documents (one a line), and the other rules, schedules and types."""
  assert call(*QUICK, f"--text={text}", "--learning_rate=0.01", *args, f"--out={tmp_path}") == 0
  found = rows(tmp_path)
  assert found[-1]["loss"] < found[0]["loss"] - 0.1
  assert found[-1]["labels"] < 8 * 16 or "--objective=glm" not in args
  assert (found[-1]["loss_scale"] is not None) == ("--precision=O2" in args)


@pytest.mark.parametrize("mesh", ["data=2,tensor=2,fsdp=2", pytest.param("fsdp=8", marks=pytest.mark.slow)])
def test_a_run_on_a_mesh_is_that_of_one_device(whole, tmp_path, mesh):
  out, args = whole
  assert call(*args, f"--mesh={mesh}", f"--out={tmp_path}") == 0
  for found, expected in zip(learned(tmp_path), learned(out), strict=True):
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_run_that_diverges_names_step_rows_and_tensor(whole, text, tmp_path, capsys):
  """The rate is so high that numbers overflow; the checkpoint before it stays."""
  args = (*QUICK, f"--text={text}", "--learning_rate=1e9", "--warmup=0.5", "--save_every=2", "--log_every=1")
  assert call(*args, f"--out={tmp_path}") == 1
  said = capsys.readouterr().err
  found = re.search(
    r"at step (\d+) \(batch (\d+), rows ([\d, ]+) of (\S+); the first tensor that is not finite is the (.+)\);",
    said,
  )
  assert found, said
  step, batch = int(found[1]), int(found[2])
  assert batch in (step - 1, step - 2) and len(found[3].split(",")) == 8 and found[4] == str(text)
  assert re.match(r"(output|gradient) of \S+|parameter \S+, before the step", found[5])
  there, state = restore_tree(tmp_path / "checkpoints")
  assert there < step and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["params"]))


def test_a_run_that_diverges_says_so_where_there_is_no_memory_to_look(text, tmp_path, monkeypatch, capsys):
  def full(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

  monkeypatch.setattr(divergence, "first_bad", full)
  args = (*QUICK, f"--text={text}", "--learning_rate=1e9", "--save_every=2", f"--out={tmp_path}")
  assert call(*args) == 1
  assert re.search(r"cannot be told: RESOURCE_EXHAUSTED: out of memory\)", capsys.readouterr().err)


def test_a_run_that_is_refused_leaves_the_record_of_the_other(whole, tmp_path):
  out, args = whole
  record = (out / "config.json").read_bytes()
  assert call(*args, f"--out={out}", "--learning_rate=0.5") == CheckpointError.exit_code
  assert (out / "config.json").read_bytes() == record


def test_tokens_a_second_are_those_of_training(text, tmp_path, monkeypatch):
  """Of devices that need 2 s a step and 1000 s a look at held-out text: the steps told of after it are timed together."""
  now, looks = [0.0], []
  monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
  args = ("--smoke", f"--text={text}", "--steps=12", "--log_every=1", "--mesh=data=8", "--device=v5e")
  s = settings_of(*args)
  made = setup.set_up(s)
  watch = run.Watch(s, made, tmp_path, Progress(io.StringIO()))

  def done(step):
    now[0] = max(now[0], 2.0 * step + 1000 * len(looks))

  def look(params):
    looks.append(params)
    now[0] += 1000
    return {"loss": 1.0}

  def told(step):
    done(step)
    watch.step(step, {"loss": 1.0, "updates": step // 2})

  monkeypatch.setattr(run.jax, "block_until_ready", lambda state: done(state["params"]))
  watch.evaluate = look
  watch.start(0)
  for step in range(1, 13):
    watch.state(step, {"params": step})
    if step > 2:
      told(step - 2)
  told(11)
  told(12)
  watch.close()
  found = rows(tmp_path)
  assert looks == [10, 12] and [row["held_out_loss"] for row in found] == [None] * 9 + [1.0, None, 1.0]
  assert [row["skipped"] for row in found] == [step - step // 2 for step in range(1, 13)]
  rate, peak = s.batch_size * s.length / 2, flops.DEVICES["v5e"].flops
  untimed = (1, 8, 9, 11)
  assert [row["tokens_per_second"] for row in found] == [
    None if step in untimed else pytest.approx(rate) for step in range(1, 13)
  ]
  cost = flops.count(made.model.cfg, s.length)
  assert found[2]["mfu"] == pytest.approx(cost.mfu(rate / 8, peak)) and found[2]["hfu"] == found[2]["mfu"]


def test_a_profile_and_events_where_they_are_asked_for(text, tmp_path, monkeypatch, capsys):
  args = (*QUICK, f"--text={text}", "--steps=6", "--profile=2:4", "--tensorboard", f"--out={tmp_path}")
  assert call(*args) == 0
  assert list(tmp_path.glob("profile/**/*.xplane.pb")) and list(tmp_path.glob("tensorboard/events*"))


def test_what_a_step_needs_without_a_run(tmp_path, capsys):
  """The state is given up for the next one, and the program's products are those of the formula."""
  args = ("--compile_only", "--mesh=data=4,tensor=2", "--rules=sequence", "--train=lora", "--lora_rank=4")
  assert call(*QUICK, *args, f"--out={tmp_path}") == 0
  rows = list(map(json.loads, (tmp_path / "compiled" / "results.jsonl").read_text().splitlines()))
  number = {row["quantity"]: row["value"] for row in rows}
  assert number["aliased"] == pytest.approx(number["outputs"], rel=0.02) and number["temporaries"] > 0
  assert number["all-gather, number"] > 0 and rows[0]["job"] == "train" and rows[0]["rules"] == "sequence"
  assert [path.name for path in tmp_path.iterdir()] == ["compiled"]
  assert f"report and results: {tmp_path}" in capsys.readouterr().out


def test_overflows_are_counted_over_a_stop(text, tmp_path, monkeypatch):
  """Stopped between two rows, with skipped steps before and after: the rows are those of a run that was not."""
  args = (*QUICK, f"--text={text}", "--precision=O1", "--z_loss=10", "--log_every=5", "--save_every=12")
  step = run.Watch.step

  def stopping(self, number, metrics):
    step(self, number, metrics)
    if number == 2:
      signal.raise_signal(signal.SIGTERM)

  assert call(*args, f"--out={tmp_path / 'whole'}") == 0
  with monkeypatch.context() as patched:
    patched.setattr(run.Watch, "step", stopping)
    assert call(*args, f"--out={tmp_path / 'cut'}") == 75
  assert call(*args, f"--out={tmp_path / 'cut'}") == 0
  assert learned(tmp_path / "cut") == learned(tmp_path / "whole")
  assert learned(tmp_path / "whole")[0]["skipped"] > 0
