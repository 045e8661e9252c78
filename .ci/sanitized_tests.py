"""Runs pytest with the helpers of a build folder, made with sanitizers, in place of the installed ones.

python .ci/sanitized_tests.py BUILD [PYTEST'S ARGUMENTS]
"""

import ctypes
import importlib.util
import sys
from pathlib import Path

import pytest

assert hasattr(ctypes.CDLL(None), "__asan_init"), "AddressSanitizer is not loaded: LD_PRELOAD has to name it"

(built,) = Path(sys.argv[1]).glob("helpers.*.so")
assert b"__asan_report_load" in built.read_bytes(), f"{built} is not built with AddressSanitizer"
spec = importlib.util.spec_from_file_location("llmpipe.helpers", built)
assert spec and spec.loader
helpers = sys.modules["llmpipe.helpers"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)
import llmpipe.data.dataset.indexed  # noqa: E402

assert llmpipe.data.dataset.indexed.helpers is helpers

sys.exit(pytest.main(sys.argv[2:]))
