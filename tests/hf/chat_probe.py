"""In place of chat_process.py: what a template that got out of the sandbox would find, as the answer."""

import json
import os
import sys
import tempfile

from_parent = json.load(sys.stdin)
sys.path[:] = from_parent["path"]

from jaxllm.hf import chat_process  # noqa: E402

chat_process._limit_memory(from_parent["memory"])
try:
  with tempfile.TemporaryFile() as file:
    file.write(b"x")
  written = "written"
except OSError:
  written = "OSError"
json.dump({"text": f"{dict(os.environ)} {written}"}, sys.stdout)
