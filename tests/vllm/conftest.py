"""Tests with vLLM itself, which needs a separate environment: `make test-vllm`."""

from importlib.util import find_spec

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*"]
