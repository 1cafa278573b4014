"""Tokenizers made on the spot, of the kinds that write text differently, as (decode, encode, number of ids)."""

import functools
import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

LINES = [
  "the quick brown fox jumps over the lazy dog; 你好，世界。 emoji \U0001f600\U0001f680 too\n",
  "  def main(argv):\n\treturn 0 # naïve señor Müller ¼ 東京 한국어\n",
  "\U0001f469\u200d\U0001f469\u200d\U0001f467 family, flag \U0001f1e9\U0001f1ea, combined e\u0301 and \U0001f44d\U0001f3fd\r\n",
] * 3


def byte_level():
  """GPT-2's kind: 320 ids of bytes and runs of them, whose ends need not be those of characters."""
  own = tokenizers.Tokenizer(models.BPE())
  own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  own.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
  )
  own.train_from_iterator(LINES, trainer)
  return own


def sentencepiece():
  """Llama 2's kind: spaces are \u2581, the first of a text is dropped, and what has no piece is bytes."""
  trained = tokenizers.Tokenizer(models.BPE())
  trained.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  trained.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")  # no piece of several words
  trained.train_from_iterator(
    ["the quick brown fox jumps over the lazy dog, 你好"],
    trainers.BpeTrainer(vocab_size=90, show_progress=False),
  )
  plain = json.loads(trained.to_str())
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *plain["model"]["vocab"]]
  plain["model"] |= {
    "vocab": {piece: i for i, piece in enumerate(dict.fromkeys(pieces))},
    "unk_token": "<unk>",
    "fuse_unk": True,
    "byte_fallback": True,
  }
  own = tokenizers.Tokenizer.from_str(json.dumps(plain))
  own.decoder = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  )
  own.add_special_tokens(["<s>", "</s>"])
  return own


def word_pieces():
  """BERT's kind: words apart by spaces, ## goes on with one; no part of a character."""
  words = ["[UNK]", "the", "quick", "##er", "##s", ",", ".", "你", "n't", "do"]
  own = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
  own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  own.decoder = decoders.WordPiece()
  return own


@functools.cache
def made(kind):
  """(decode, encode, number of ids) of a kind, special tokens left out of texts; "bytes" are those of UTF-8 themselves."""
  if kind == "bytes":
    return lambda ids: bytes(ids).decode(errors="replace"), lambda text: list(text.encode()), 256
  own = {"byte_level": byte_level, "sentencepiece": sentencepiece, "word_pieces": word_pieces}[kind]()
  return own.decode, lambda text: own.encode(text).ids, own.get_vocab_size()


KINDS = ("bytes", "byte_level", "sentencepiece", "word_pieces")
