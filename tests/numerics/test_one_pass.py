"""The compiled kernels read their values once: a second loop would read them again."""

import pytest
import torch
from torch._inductor.graph import GraphLowering

from qat.numerics import kernels


@pytest.mark.parametrize(
    ("name", "form"), [pytest.param("forward_ste_codes", "flat", marks=pytest.mark.slow), ("backward_lsq", "strips")]
)
def test_a_kernel_is_one_loop(monkeypatch: pytest.MonkeyPatch, name: str, form: str) -> None:
    written: list[str] = []
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(written.append))
    with torch._inductor.config.patch(force_disable_caches=True):
        kernel = kernels.compiled.__wrapped__(name, form, torch.float32, "cpu", 2)
    if kernel is None:
        pytest.skip("no compiler")
    (source,) = written
    assert source.count("#pragma omp for") == 1
