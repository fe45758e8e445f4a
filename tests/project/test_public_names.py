"""The package's public names, and the text of show_config()."""

import re

import torch

import fused_lars
from paths import ROOT


def test_versions():
    text = fused_lars.show_config()
    assert f"fused_lars {fused_lars.__version__}" in text
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", fused_lars.__version__)
    built_for = re.search(r"^torch: (\d+\.\d+)", text, re.MULTILINE).group(1)
    assert torch.__version__.startswith(built_for)
    assert re.search(r"^CUDA: \S+", text, re.MULTILINE)
    assert re.search(r"^CPU: (baseline|avx2|avx512), \d+ threads$", text, re.MULTILINE)


def test_cuda_is_said_as_it_is():
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key("fused_lars::step_", "CUDA")
    line = re.search(r"^CUDA: (.*)$", fused_lars.show_config(), re.MULTILINE).group(1)
    assert bool(re.search(r"\d", line)) == has_kernel, line


def test_a_prompt_shows_it_as_print_does():
    text = fused_lars.show_config()
    assert isinstance(text, str)
    assert repr(text) == str(text) == text
    assert len(repr(text).splitlines()) == 4


def test_names():
    for name in ("LARS", "param_groups", "show_config", "ops"):
        assert name in fused_lars.__all__
    assert all(hasattr(fused_lars, name) for name in fused_lars.__all__)
    assert fused_lars.ops is torch.ops.fused_lars
    assert issubclass(fused_lars.LARS, torch.optim.Optimizer)


def test_the_api_page_has_every_name():
    page = ROOT / "docs" / "api" / "index.rst"
    listed = re.findall(r"^\.\. (?:autoclass|autofunction|py:data):: (\w+)$", page.read_text(), re.MULTILINE)
    assert sorted([*listed, "__version__"]) == sorted(fused_lars.__all__)
