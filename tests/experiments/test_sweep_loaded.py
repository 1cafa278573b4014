"""A checkpoint as the model of a sweep: what can be put on it, in which program, on a mesh, and what is refused."""

import dataclasses
import itertools
import json
from contextlib import nullcontext

import jax
import loaded_case
import numpy as np
import pytest
import sweep_case

from experiments import evaluate as evaluate_script
from experiments.checkpoint import scheme_of
from experiments.extrapolation import evaluate, report, settings, variants
from experiments.extrapolation.loaded import Loaded
from experiments.extrapolation.models import Models
from jaxllm.config import Layer
from jaxllm.errors import ConfigError
from jaxllm.evaluate.text import Text
from jaxllm.nn import Transformer
from jaxllm.position import POSITIONS, LogN, Rope
from jaxllm.study import methods

L0 = loaded_case.LENGTH
ROPE, LOCAL = Rope(original_length=L0), Rope(base=100.0, original_length=L0)


def layers(*pairs):
  return tuple(Layer(position, window) for position, window in pairs)


MODELS = {
  "all layers": layers((ROPE, None)),
  "windows with the same RoPE": layers((ROPE, 6), (ROPE, None)),
  "windows with another RoPE": layers((LOCAL, 6), (ROPE, None)),
  "some without positions": layers((ROPE, None), (POSITIONS["nope"](), None)),
  "stretched already": layers((POSITIONS["llama3"](original_length=L0, factor=2.0), None)),
  "by the length of each query": layers((POSITIONS["dynamic_ntk"](original_length=L0, factor=2.0), None)),
}


class Given(Models):
  """A model with random parameters, as a loaded one is tested, on random tokens that stand for 1 to 3 bytes."""

  in_length = 4

  def __init__(self, cfg):
    rng = np.random.default_rng(0)
    self.schemes = {methods.LOADED: scheme_of(cfg)}
    self.configs = self.tested = {methods.LOADED: cfg}
    self.text = Text(rng.integers(0, 256, 400).astype(np.int32), rng.integers(1, 4, 400), bos=7)
    self._params = jax.tree.map(jax.numpy.asarray, loaded_case.params(cfg))

  def params(self, scheme, seed):
    return self._params


def chosen(*names, lengths=(40,)):
  """Settings of a sweep that reads a model's own lengths from nowhere."""
  base = dict(out="", corpus=None, factors=None, seeds=1, windows=3, dtype="float32", attention="plain")
  return settings.Settings(
    **base, schemes=("-",), methods=names, metrics=methods.TOKEN_METRICS, lengths=lengths, train_length=L0
  )


def cells(found, models):
  """All rows of a sweep."""
  groups = methods.plan(
    list(models.schemes.values()), found.methods, found.metrics, None, L0, found.lengths, 1, found.windows
  )
  return [row for group in groups for row in evaluate.compute(found, models, group)]


def alone(cfg, params, tokens):
  """(nats, hits) of a model by itself, in float64 from its logits."""
  tables, model = cfg.rope_tables(seq_len=tokens.shape[1] - 1), Transformer(cfg)
  logits = jax.jit(lambda tokens: model.apply({"params": params}, tokens, rope=tables)[0])(tokens[:, :-1])
  log_p, labels = np.asarray(jax.nn.log_softmax(logits), np.float64), tokens[:, 1:]
  return -np.take_along_axis(log_p, labels[..., None], -1)[..., 0], log_p.argmax(-1) == labels


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("windows with the same RoPE", marks=pytest.mark.core),
    pytest.param("stretched already", marks=pytest.mark.slow),
    pytest.param("by the length of each query", marks=pytest.mark.slow),
    *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if "other" in name or "without" in name),
  ],
)
def test_a_method_is_on_the_layers_over_all_keys_and_the_others_stay(name):
  """Every number is that of the model alone with the method on it, whichever RoPEs share a program with it."""
  cfg = loaded_case.config(layers=MODELS[name])
  models, found = Given(cfg), chosen("none", "yarn", "rerope")
  rows, (tokens, sizes) = cells(found, models), models.text.windows(40, 40, 3)
  assert (tokens[:, 0] == 7).all()
  nats_of = {}
  for method in found.methods:
    own = cfg if method == "none" else variants.on(cfg, methods.Variant(method, 40 / L0), L0)
    nats, hits = alone(own, models.params("-", 0), tokens)
    nats_of[method] = nats
    wanted = {
      "bpb": nats.sum() / np.log(2) / sizes.sum(),
      "bpb_last": nats[:, -L0:].sum() / np.log(2) / sizes[:, -L0:].sum(),
      "accuracy": hits.mean(),
      "perplexity": np.exp(nats.mean()),
    }
    for metric, value in wanted.items():
      (row,) = [r for r in rows if (r["method"], r["metric"], r["length"]) == (method, metric, 40)]
      assert row["value"] == pytest.approx(value, rel=5e-6), (method, metric)
  assert np.abs(nats_of["yarn"] - nats_of["none"]).max() > 0.01
  assert np.abs(nats_of["rerope"] - nats_of["yarn"]).max() > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_methods_that_are_tables_share_one_program(name):
  """One structure and one config, so that the compiled program is one too."""
  cfg = loaded_case.config(layers=MODELS[name])
  program = variants.shared_program(cfg)
  names = [name for name, method in methods.METHODS.items() if method.tables_only]
  own = [variants.with_variant(cfg, methods.Variant(n, 2.0), (2.0,), L0, 40) for n in names]
  shapes = lambda tables: jax.tree.map(lambda leaf: (np.shape(leaf), np.asarray(leaf).dtype), tables)
  found = [shapes(variants.aligned(one, program, 40)) for one in own]
  assert all(one == found[0] for one in found)
  windowed = [layer.position for layer in cfg.layers if layer.window]
  for one in own:  # and what is windowed keeps its numbers
    assert [layer.position for layer in one.layers if layer.window] == windowed


WHY = [
  (dict(layers=layers((POSITIONS["alibi"](), None))), "has no RoPE (its positions: alibi)", "alibi"),
  (dict(layers=layers((ROPE, 8))), "every RoPE layer of the model has a window (8 keys)", "rope"),
  (dict(layers=layers((POSITIONS["rerope"](original_length=L0), None))), "no layer of plain RoPE", "rerope"),
  (dict(layers=layers((POSITIONS["learned"](32), None))), "has no RoPE (its positions: learned)", "learned"),
]


@pytest.mark.parametrize(("fields", "words", "position"), WHY, ids=[position for *_, position in WHY])
def test_a_model_without_rope_over_all_keys_says_what_it_has(fields, words, position):
  scheme = scheme_of(loaded_case.config(**fields))
  assert not scheme.plain_rope and scheme.position == position
  assert words in methods.not_applicable(scheme, "yarn")
  windowed = fields["layers"][0].window is not None
  assert (methods.not_applicable(scheme, "logn") is None) != windowed
  assert methods.choose("default", (scheme,)) == (("none",) if windowed else ("none", "logn"))
  with pytest.raises(ConfigError, match="--methods=yarn with --model: yarn changes RoPE"):
    methods.check_methods_matter((scheme,), ("none", "yarn"), None, L0, (64,))


def test_log_n_is_refused_where_every_layer_has_a_window():
  """It leaves windowed layers as they are, and would change nothing."""
  scheme = scheme_of(loaded_case.config(layers=layers((ROPE, 8), (POSITIONS["nope"](), 4))))
  with pytest.raises(
    ConfigError, match=r"--methods=logn with --model: .* every layer of the model has a window"
  ):
    methods.check_methods_matter((scheme,), ("none", "logn"), None, L0, (64,))
  scheme = scheme_of(loaded_case.config(layers=layers((ROPE, 8), (POSITIONS["nope"](), None))))
  methods.check_methods_matter((scheme,), ("none", "logn"), None, L0, (64,))


def test_queries_that_are_scaled_already_take_no_log_n():
  scheme = scheme_of(loaded_case.config(query_scale=LogN(L0)))
  assert methods.not_applicable(scheme, "logn") == "the model scales its queries by position already"


def test_learned_positions_end_where_their_table_does():
  scheme = scheme_of(loaded_case.config(layers=layers((POSITIONS["learned"](32), None))))
  groups = methods.plan([scheme], ("none",), ("bpb",), None, L0, (16, 32, 33), 1, 2)
  programs = {
    group.name.split("/")[2]: group.name.split("/")[3] for group in groups if "in_length" not in group.name
  }
  assert programs == {"16": "tables", "32": "tables", "33": "none"}
  assert methods.beyond_table(scheme, L0, 33) == "learned positions end at 32"


def test_a_method_that_the_model_has_already_is_refused():
  cfg = loaded_case.config(layers=layers((POSITIONS["yarn"](original_length=L0, factor=4.0), None)))
  models = Given(cfg)
  with pytest.raises(ConfigError, match=r"--methods=yarn: at 64, .* those of the model as it is"):
    evaluate.check_tables_differ(chosen("none", "yarn", lengths=(64,)), models)
  evaluate.check_tables_differ(chosen("none", "yarn", lengths=(32,)), models)
  control = dataclasses.replace(chosen("none", "yarn", lengths=(64,)), factors=(1.0, 4.0))
  with pytest.raises(ConfigError, match="--methods=yarn"):
    evaluate.check_tables_differ(control, models)
  evaluate.check_tables_differ(dataclasses.replace(control, factors=(1.0,)), models)


def test_default_leaves_out_what_the_model_has_already(tmp_path, capfd):
  """It is said in the settings in force, which the report repeats; a method that is named is refused."""
  cfg = loaded_case.config(layers=layers((POSITIONS["yarn"](original_length=L0, factor=4.0), None)))
  (tmp_path / "text.txt").write_text(loaded_case.text(20))
  base = (f"--model={loaded_case.save(tmp_path / 'model', cfg)}", f"--text={tmp_path / 'text.txt'}")
  base += ("--factors=4", "--lengths=16,64", "--windows=2")
  for group in methods.GROUPS:
    models = Loaded(sweep_case.settings_of(*base, f"--methods={group}"))
    assert models.left_out == ("yarn",)
    assert set(models.settings.methods) == set(methods.GROUPS[group]) - {"yarn"}
    evaluate.check_tables_differ(models.settings, models)
    line = f"eft out of --methods={group}: yarn, with which the model at 64 is"
    assert line in capfd.readouterr().out
    config = {"devices": ["cpu"], "libraries": {"jax": "0"}, "python": "3"}
    assert line in "\n".join(models.lines(config))
  assert sweep_case.run(*base, "--methods=none,yarn", f"--out={tmp_path / 'out'}") == 2
  assert "--methods=yarn: at 64" in capfd.readouterr().err


LINEAR = loaded_case.config(layers=layers((POSITIONS["pi"](original_length=8 * L0, factor=8.0), None)))


def test_methods_count_from_before_a_linear_scaling_of_the_models_own():
  """They take its place: x8 of the length before it is the model as it is, x4 half of it, and never x4 of what it reaches."""
  (plain, own), scheme = (ROPE.frequencies(8)[0], LINEAR.ropes[0].frequencies(8)[0]), scheme_of(LINEAR)
  for factor in (4.0, 8.0, 16.0):
    on = variants.on(LINEAR, methods.Variant("pi", factor), L0)
    np.testing.assert_array_equal(on.ropes[0].frequencies(8)[0], plain / factor)
    np.testing.assert_array_equal(on.ropes[0].frequencies(8)[0], own * 8 / factor)
  yarn = variants.on(LINEAR, methods.Variant("yarn", 8.0), L0).ropes[0]
  wanted = POSITIONS["yarn"](original_length=L0, factor=8.0).frequencies(8)[0]
  np.testing.assert_array_equal(yarn.frequencies(8)[0], wanted)
  assert scheme.linear == 8.0
  for name, raises in (("pi", True), ("rerope", True), ("none", False), ("logn", False)):
    with (
      pytest.raises(ConfigError, match=rf"{name} replaces .* linear x8.* --train_length=")
      if raises
      else nullcontext()
    ):
      methods.check_counts_from(scheme, name, 8 * L0, "--methods=all")
  for given in MODELS.values():
    assert scheme_of(loaded_case.config(layers=given)).linear is None


def test_a_scaling_of_the_models_own_is_named_where_methods_replace_it(tmp_path, capfd, monkeypatch):
  monkeypatch.setattr(report.plots, "lines", lambda *args, **kwargs: None)
  directory = loaded_case.save(tmp_path / "model", dataclasses.replace(LINEAR, context_length=8 * L0))
  (tmp_path / "text.txt").write_text(loaded_case.text(20))
  base = (
    f"--model={directory}",
    f"--text={tmp_path / 'text.txt'}",
    f"--out={tmp_path / 'out'}",
    "--windows=2",
    "--metrics=bpb_last",
  )
  assert sweep_case.run(*base, "--methods=pi", "--factors=2") == 2
  assert "--methods=pi: pi replaces the model's own linear x8" in capfd.readouterr().err
  wide = ("--methods=none,pi", "--factors=4", f"--train_length={L0}", "--lengths=32")
  assert sweep_case.run(*base, *wide) == 0
  line = "ethods: those that change RoPE replace the model's own linear x8, and count from 16 tokens"
  assert line in capfd.readouterr().out and line in (tmp_path / "out" / "report.md").read_text()
  script = dict(script=evaluate_script, check=evaluate_script.check)
  assert sweep_case.run(*base[:3], "--window=32", "--method=pi", "--factor=4", **script) == 2
  assert "--method=pi: pi replaces the model's own linear x8" in capfd.readouterr().err
  short = (
    "--smoke",
    "--window=32",
    "--method=pi",
    "--factor=4",
    f"--train_length={L0}",
    f"--out={tmp_path / 'alone'}",
  )
  assert sweep_case.run(*base[:2], *short, **script) == 0
  assert line in capfd.readouterr().out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """(a directory of a model, a text as a file)."""
  root = tmp_path_factory.mktemp("loaded")
  (root / "text.txt").write_text(loaded_case.text(20))
  return loaded_case.save(root / "model", loaded_case.config()), root / "text.txt"


SHORT = ("--methods=none,yarn", "--lengths=16,32", "--windows=3", "--metrics=bpb_last,accuracy")


@pytest.mark.parametrize("names", ["pi,yarn", pytest.param("rerope", marks=pytest.mark.slow)])
def test_a_mesh_changes_no_number(checkpoint, tmp_path, capfd, monkeypatch, names):
  """Methods at twice the trained length, and windows that do not divide over it, included."""
  monkeypatch.setattr(report.plots, "lines", lambda *args, **kwargs: None)
  base = (
    f"--model={checkpoint[0]}",
    f"--text={checkpoint[1]}",
    *SHORT,
    f"--methods=none,{names}",
    "--lengths=32",
  )
  found = []
  for name, mesh in (("one", ()), ("mesh", ("--mesh=fsdp=2,tensor=4",))):
    assert sweep_case.run(*base, *mesh, f"--out={tmp_path / name}") == 0
    rows = (tmp_path / name / "results.jsonl").read_text().splitlines()
    found.append({(r["method"], r["length"], r["metric"]): r["value"] for r in map(json.loads, rows)})
  assert found[0].keys() == found[1].keys()
  for cell, value in found[0].items():
    assert found[1][cell] == pytest.approx(value, rel=2e-6), cell
  losses = [found[0][name, 32, "bpb_last"] for name in ("none", *names.split(","))]
  assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-3, losses
  assert "mesh: fsdp=2,tensor=4 of cpu, rules fsdp_tensor" in capfd.readouterr().out


@pytest.mark.parametrize(
  ("args", "code", "named"),
  [
    pytest.param(["--steps=5"], 2, ["--steps=5", "--model", "train"], marks=pytest.mark.core),
    (["--schemes=rope"], 2, ["--schemes=rope", "--model"]),
    (["--learning_rate=1"], 2, ["--learning_rate=1.0", "--model"]),
    (["--lengths=8"], 2, ["--lengths=8", "--train_length=16"]),
    (["--train_length=64", "--lengths=32"], 2, ["--lengths=32", "--train_length=64"]),
    (["--train_length=4"], 2, ["--train_length=4", "at least 8"]),
    (["--methods=yarn", "--lengths=16"], 2, ["--methods=yarn", "changes nothing"]),
    (["--methods=longrope"], 2, ["longrope", "cannot be put on a trained model"]),
    (["--metrics=ppl"], 2, ["'ppl'", "perplexity"]),
    (["--rules=tensor"], 2, ["--rules=tensor", "--mesh"]),
    (["--mesh=tensor=8"], 2, ["num_heads = 4", "tensor"]),
    (["--corpus=tests"], 2, ["--text", "--corpus=tests"]),
    (["--lengths=16,4096"], 65, ["--text=", "expected at least 4145", "--lengths", "--windows"]),
    (["--model="], 2, ["--model="]),
    (["--model=no/such/place/there"], 65, ["no/such/place/there"]),
  ],
)
def test_what_is_refused(checkpoint, tmp_path, capfd, args, code, named):
  base = (f"--model={checkpoint[0]}", f"--text={checkpoint[1]}", *SHORT, f"--out={tmp_path / 'out'}")
  assert sweep_case.run(*base, *args) == code
  error = capfd.readouterr().err
  assert error.startswith("error: ") and "Traceback" not in error
  for words in named:
    assert words in error, error


@pytest.mark.parametrize("flag", ["--mesh=fsdp=8", "--rules=fsdp", "--text=README.md"])
def test_flags_for_a_loaded_model_are_refused_without_one(tmp_path, capfd, flag):
  assert sweep_case.run(flag, f"--out={tmp_path / 'out'}") == 2
  assert f"{flag} without --model" in capfd.readouterr().err
