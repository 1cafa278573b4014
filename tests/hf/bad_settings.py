"""Settings and tokenizers that are damaged, lie, or are of another model, a row each: damage(directory), error, its reason."""

import json

from damage import PICKLE, SETTINGS, SPECIAL, content, instead, settings, sparse

from jaxllm.errors import CheckpointError, ConfigError, TokenizerError

BOM = b"\xef\xbb\xbf"
CONFIG_BYTES = {
  "empty": (b"", "not JSON"),
  "not JSON": (b"{a: 1}", "not JSON"),
  "not UTF-8": (b'{"a": "\xff"}', "not JSON"),
  "a byte order mark": (BOM + json.dumps(SETTINGS).encode(), "not JSON .*BOM"),
  "a list": (b"[1]", "a JSON list, expected an object"),
  "nested too deep": (b'{"a":' * 100_000, "not JSON"),
  "a number of 5,000 digits": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not JSON"),
  "NaN": (b'{"rms_norm_eps": NaN}', "found NaN, expected finite"),
  "Infinity": (b'{"rms_norm_eps": -Infinity}', "found -Infinity, expected finite"),
  "1e999": (b'{"rms_norm_eps": 1e999}', "found 1e999, expected finite"),
  "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
  "a key twice, a megabyte long": (b'{"%b": 1, "%b": 2}' % (2 * (b"k" * 10**6,)), "the key 'k{100}' twice"),
  "no object inside": (b"null", "a JSON NoneType, expected an object"),
}
CONFIGURED = {
  f"config.json is {what}": (content("config.json", data), ConfigError, reason)
  for what, (data, reason) in CONFIG_BYTES.items()
}
CONFIGURED |= {
  f"{name} of a terabyte": (
    instead(name, sparse),
    ConfigError,
    f"{name}: found 1,099,511,627,776 bytes, expected at most 4,194,304",
  )
  for name in ("config.json", "generation_config.json")
}
HUGE = 2**31 - 1
LONG = "x" * 10**6
LINEAR = dict(rope_type="linear", factor=2.0)
CONFIGS = [
  ("no model_type", dict(model_type=None), "model_type: found null, expected a string"),
  (
    "a family nobody has",
    dict(model_type="lama"),
    r"model_type: found 'lama', expected one of .*\(by its spelling nearest: llama\)",
  ),
  ("a text of a megabyte", dict(model_type=LONG), r"model_type: found 'x{30,40}\.\.\."),
  ("a key of a megabyte", {LONG: 1}, r"unknown settings.*'x{30,40}\.\.\..* = 1; expected some of"),
  ("a key that rewrites the terminal", {"\x1b[2J": 1}, r"unknown settings.*'\\x1b\[2J' = 1"),
  ("20,000 unknown keys", {f"hidden_sizes{i}": i for i in range(20_000)}, "and 19,980 more"),
  ("an activation nobody has", dict(hidden_act="sliu"), "hidden_act: found 'sliu', expected one of silu"),
  (
    "a rope nobody has",
    dict(rope_scaling=dict(rope_type="llama4")),
    "rope_type: found 'llama4'.*nearest: llama3",
  ),
  (
    "a key of rope nobody has",
    dict(rope_scaling=LINEAR | dict(betafast=3)),
    "rope_scaling.betafast = 3",
  ),
  ("rope twice", dict(rope_scaling=LINEAR, rope_parameters=LINEAR), "rope_scaling: .*beside rope_parameters"),
  ("true for a number", dict(num_hidden_layers=True), "num_hidden_layers: found true"),
  ("a number for true", dict(tie_word_embeddings=1), "tie_word_embeddings: found 1, expected true or false"),
  (
    "2^31",
    dict(hidden_size=2**31),
    "hidden_size: found 2147483648, expected an integer from 1 to 2147483647",
  ),
  ("10^400", dict(vocab_size=10**400), "vocab_size: found a number of very many digits"),
  ("a list, 300 deep", dict(hidden_size=json.loads("[" * 300 + "]" * 300)), r"hidden_size: found \[\[\["),
  (
    "quantized",
    dict(quantization_config=dict(quant_method="gptq")),
    "quantization_config: found .*quantized",
  ),
  (
    "heads that do not divide",
    dict(num_key_value_heads=3),
    "num_key_value_heads: found 3, expected a divisor",
  ),
  (
    "2^31 - 2 heads",
    dict(num_attention_heads=HUGE - 1),
    "num_attention_heads: found 2147483646, expected a divisor",
  ),
  ("heads of 2^31 - 2", dict(head_dim=HUGE - 1), "head_dim.*: found 2147483646, expected at most 65536"),
  (
    "heads of 2^28",
    dict(hidden_size=2**30, head_dim=None),
    "head_dim.*: found 268435456, expected at most 65536",
  ),
  (
    "10^9 layers",
    dict(num_hidden_layers=10**9),
    "num_hidden_layers: found 1000000000, expected an integer from 1 to",
  ),
  (
    "more parameters than any model",
    dict(hidden_size=2**30, intermediate_size=HUGE),
    r"asks for some 2\^62 parameters \(a vocabulary of 61, width 1,073,741,824, .*MLP 2,147,483,647\), beyond any model",
  ),
]
CONFIGURED |= {
  f"config.json: {what}": (settings(**changes), ConfigError, reason) for what, changes, reason in CONFIGS
}
LIES = [
  (
    "vocab_size",
    HUGE,
    "asks for some 103,079,245,008 parameters .*, and the files hold 68,400, most by vocab_size = 2147483647",
  ),
  ("hidden_size", 2**24, "asks for some .*most by hidden_size = 16777216"),
  ("head_dim", 2**16, "asks for some .*most by head_dim = 65536"),
  ("intermediate_size", HUGE, "asks for some .*most by intermediate_size = 2147483647"),
  ("num_hidden_layers", 9999, "says 9,999 layers, but the files hold 3"),
  ("num_hidden_layers", 999, "asks for some .*most by num_hidden_layers = 999"),
  ("num_hidden_layers", 4, r"files hold 3 layers, expected 4 \(num_hidden_layers = 4\)"),
]
CONFIGURED |= {
  f"config.json: {key} = {number}": (settings(**{key: number}), CheckpointError, reason)
  for key, number, reason in LIES
}
CONFIGURED |= {
  "generation_config.json: a text for a token": (
    settings("generation_config.json", eos_token_id="</s>"),
    ConfigError,
    "generation_config.json: eos_token_id: found '</s>', expected a token id",
  ),
  "generation_config.json is not JSON": (
    content("generation_config.json", "x"),
    ConfigError,
    "generation_config.json: not JSON",
  ),
}

TOKENIZER_JSON = "tokenizer.json"


def vocabulary(change):
  """Another tokenizer.json."""

  def damage(directory):
    plain = json.loads((directory / TOKENIZER_JSON).read_text())
    change(plain)
    (directory / TOKENIZER_JSON).write_text(json.dumps(plain))

  return damage


TOKENIZER = (
  {
    f"{name} is {what}": (
      instead(name, make),
      TokenizerError if what == "a terabyte" else CheckpointError,
      f"{name}: {reason}",
    )
    for name in (TOKENIZER_JSON, "tokenizer_config.json")
    for what, (make, reason) in SPECIAL.items()
  }
  | {
    f"tokenizer.json of {what}": (
      content(TOKENIZER_JSON, data),
      TokenizerError,
      "tokenizer.json: not a tokenizer",
    )
    for what, data in (
      ("nothing", b""),
      ("an empty object", b"{}"),
      ("no UTF-8", b"\xff"),
      ("a number", b'{"model": 1}'),
      ("a pickle", PICKLE),
      ("lists, 100,000 deep", b"[" * 100_000),
      ("a model nobody has", b'{"version": "1.0", "model": {"type": "Banana"}}'),
    )
  }
  | {
    "tokenizer_config.json is not JSON": (
      content("tokenizer_config.json", "x"),
      TokenizerError,
      "tokenizer_config.json: not JSON",
    ),
    "tokenizer_config.json is a list": (
      content("tokenizer_config.json", "[]"),
      TokenizerError,
      "a JSON list, expected an object",
    ),
    "a key of tokenizer_config.json twice": (
      content("tokenizer_config.json", '{"a": 1, "a": 2}'),
      TokenizerError,
      "the key 'a' twice",
    ),
    "special_tokens_map.json is not JSON": (
      content("special_tokens_map.json", "x"),
      TokenizerError,
      "special_tokens_map.json: not JSON",
    ),
    "more ids than embeddings": (
      vocabulary(lambda plain: plain["model"]["vocab"].update({"word": 61})),
      TokenizerError,
      "the tokenizer has ids up to 61, but the embedding of .* has 61 rows; take the tokenizer that the model was trained with",
    ),
    "an id of 2^32 - 1": (
      vocabulary(lambda plain: plain["model"]["vocab"].update({"word": 2**32 - 1})),
      TokenizerError,
      "the tokenizer has ids up to 4294967295, but the embedding",
    ),
    "an id below 0": (
      vocabulary(lambda plain: plain["model"]["vocab"].update({"word": -1})),
      TokenizerError,
      "not a tokenizer",
    ),
    "no end token": (
      settings("tokenizer_config.json", eos_token="<end>"),
      TokenizerError,
      "eos_token = '<end>' of tokenizer_config.json .*: not in the vocabulary; take the files of one tokenizer",
    ),
    "neither first nor end token": (
      settings("tokenizer_config.json", bos_token={"content": "<a>"}, eos_token="<b>"),
      TokenizerError,
      "bos_token = '<a>' and eos_token = '<b>' of .*not in the vocabulary",
    ),
    "a template that is no text": (
      content("chat_template.jinja", b"\xff\xfe"),
      TokenizerError,
      "chat_template.jinja: not UTF-8",
    ),
    "a template of a terabyte": (
      lambda directory: sparse(directory / "chat_template.jinja"),
      TokenizerError,
      "expected at most 4,194,304",
    ),
  }
)
