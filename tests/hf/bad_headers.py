"""Files that are no safetensors files, a row each: how model.safetensors is damaged, and the reason of the CheckpointError."""

import json
import pickle
import re

from damage import HEADER, PICKLE, WEIGHTS, archive, content, entry, instead, many, named, raw

HEADERS = {
  "empty": (content(WEIGHTS, b""), "found 0 bytes, expected 8 and more"),
  "no header": (raw(b"", b"", 0), "found a header of 0 bytes, expected 2 to"),
  "cut in the header": (
    raw(length=10**6),
    r"found 1\d\d bytes, expected a header of 1,000,000: cut short.*; fetch the file again$",
  ),
  "a length of 2^64 - 1": (raw(length=2**64 - 1), "expected a header of 18,446,744,073,709,551,615"),
  "a length of 2^63": (raw(length=2**63), "expected a header of 9,223,372,036,854,775,808"),
  "cut in the data": (raw(data=bytes(20)), "expected 1[0-9]{2}: cut short, from a on"),
  "cut in the last tensor": (raw(data=bytes(24)), "cut short, from b on"),
  "more data": (raw(data=bytes(30)), "more than its tensors"),
  "no JSON": (raw(b"{]" * 9), "header: not JSON"),
  "not UTF-8": (raw(b'{"\xff": 1}'), "header: not JSON"),
  "a list": (raw(b"[1, 2]"), "header: found a list, expected an object"),
  "nested too deep": (raw(b"[" * 100_000), "header: not JSON"),
  "a type nested deep": (
    raw(b'{"a":{"dtype":' + b"[" * 900 + b"]" * 900 + b',"shape":[],"data_offsets":[0,0]}}'),
    "header|dtype",
  ),
  "a number of 5,000 digits": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "header: not JSON"),
  "NaN": (raw(b'{"a": NaN}'), "header: found NaN, expected finite numbers"),
  "1e999": (raw(b'{"a": 1e999}'), "header: found 1e999, expected finite numbers"),
  "a tensor twice": (raw(json.dumps(HEADER)[:-1].encode() + b', "a": 1}'), "header: found the key 'a' twice"),
  "metadata": (raw(HEADER | {"__metadata__": {"a": 1}}), "__metadata__ is not an object of texts"),
  "no shape": (raw(HEADER | {"a": {"dtype": "F32", "data_offsets": [0, 24]}}), "'a': expected dtype, shape"),
  "a fourth entry": (entry(more=1), "'a': expected dtype, shape, data_offsets and nothing else"),
  "a type": (entry(dtype="F31"), "'a': found dtype 'F31', expected one of F64, F32"),
  "a type of another kind": (entry(dtype=[4]), r"'a': found dtype \[4\]"),
  "a negative dimension": (entry(shape=[-2, -3]), r"'a': found shape \[-2, -3\]"),
  "a bool": (entry(shape=[True, 6]), r"'a': found shape \[True, 6\]"),
  "a fraction": (entry(shape=[2.0, 3]), "'a': found shape"),
  "a rank of 9": (entry(shape=[6, *[1] * 8]), "'a': found shape .* at most 8"),
  "2^40 + 1": (
    entry(shape=[2**40 + 1, 0], data_offsets=[0, 0]),
    "'a': found shape .*up to 1,099,511,627,776",
  ),
  "2^63": (entry(shape=[2**63, 0], data_offsets=[0, 0]), "'a': found shape"),
  "a product that overflows": (
    entry(shape=[2**33, 2**31, 3]),
    "'a': found 24 bytes, expected [0-9,]{20,} for F32",
  ),
  "offsets the wrong way": (entry(data_offsets=[24, 0]), r"'a': found data_offsets \[24, 0\]"),
  "three offsets": (entry(data_offsets=[0, 24, 24]), "'a': found data_offsets"),
  "offsets of 2^64": (entry(data_offsets=[2**64, 2**64 + 24]), "'a': found data_offsets"),
  "bytes that do not fit the shape": (entry(data_offsets=[0, 20]), "'a': found 20 bytes, expected 24"),
  "an overlap": (entry(data_offsets=[1, 25]), "overlaps the tensor before it|leaves 1 bytes"),
  "a gap": (
    raw(HEADER | {"b": HEADER["b"] | {"data_offsets": [25, 26]}}, bytes(26)),
    "b leaves 1 bytes unused",
  ),
  "a name of 513 bytes": (named("é" * 256 + "n"), "a name of 513 bytes, expected at most 512"),
  "a name that rewrites the terminal": (named("\x1b[2J"), "characters that do not print"),
  "a name of two lines": (named("a\nb"), "characters that do not print"),
  "half a character": (named("\ud800"), "characters that do not print"),
  "too many tensors": (
    many(200_001, b'{"dtype":"U8","shape":[],"data_offsets":[0,0]}'),
    'header: found 200,001 times "data_offsets", expected at most 200,000 tensors',
  ),
  "too many keys": (many(10**6 + 1, b"0"), "header: found 1,000,001 times :"),
  "too many numbers": (raw(b"[0" + b",0" * 4_000_000 + b"]", b""), "header: found 4,000,000 times ,"),
  "a header of more than 16 MiB": (
    raw(b"{" + b" " * (16 << 20) + b"}", b""),
    "found a header of 16,777,218 bytes, expected 2 to 16,777,216",
  ),
  "a zip archive": (
    instead(WEIGHTS, archive),
    "found a zip archive, as torch.save .* write: pickles run code",
  ),
  "a pickle": (
    content(WEIGHTS, PICKLE),
    "found a pickle, which runs code when it is read; expected a safetensors file",
  ),
  "an old pickle": (content(WEIGHTS, pickle.dumps(re.compile, 0)), "cut short, or no safetensors file"),
  "an array of NumPy": (content(WEIGHTS, b"\x93NUMPY\x01\x00v\x00{'descr'"), "found an array of NumPy"),
  "GGUF": (content(WEIGHTS, b"GGUF\x03\x00\x00\x00" + bytes(99)), "found a GGUF file"),
  "HDF5": (content(WEIGHTS, b"\x89HDF\r\n\x1a\n" + bytes(99)), "found an HDF5 file"),
  "a pointer of Git LFS": (
    content(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "found a pointer of Git LFS; fetch the file itself: git lfs pull",
  ),
  "a web page": (content(WEIGHTS, "<!DOCTYPE html><html>"), "found a web page"),
}
