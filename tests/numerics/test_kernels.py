"""The kernels: what they give uncompiled, and what happens where they cannot be compiled."""

from collections.abc import Iterator

import pytest
import torch

from qat.numerics import fast, kernels

N = fast.SMALLEST


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing was compiled yet."""
    monkeypatch.setattr(kernels, "_broken", set())
    kernels.compiled.cache_clear()
    yield
    kernels.compiled.cache_clear()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "form"), kernels.KERNELS)
def test_compiled_and_written_agree(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel as Inductor compiles it against the same lines run as they are."""
    monkeypatch.setenv("QAT_KERNELS", "inductor")
    if not kernels.usable([(name, form)]):
        pytest.skip("no compiler at hand")
    args = kernels._example(name, form, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    if name == "decode":
        args[0].random_(-128, 128, generator=generator)
    else:
        args[0].normal_(generator=generator).mul_(2)
    if name.startswith("backward"):
        args[1].random_(*((0, 2) if name == "backward_ste" else (-128, 128)), generator=generator)
    with torch.no_grad():
        compiled, written = kernels.run(name, form, *args), kernels.KERNELS[name, form](*args)
    assert torch.equal(compiled[0], written[0])
    if name.endswith("codes"):
        assert torch.equal(compiled[-1], written[-1])
        with torch.no_grad():
            assert torch.equal(kernels.run("decode", form, compiled[-1], args[1], args[2])[0], written[0])
    if len(written) >= 2:
        torch.testing.assert_close(compiled[1], written[1], rtol=1e-4, atol=1e-2 if name == "backward_lsq" else 0)


@pytest.mark.usefixtures("anew")
def test_without_a_compiler_training_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setenv("QAT_KERNELS", "inductor")
    monkeypatch.setattr(torch._inductor, "standalone_compile", broken)
    x = torch.randn(2 * N, requires_grad=True)
    for _ in range(2):
        fast.fake_quantize(x, torch.tensor(0.1), torch.tensor(0.0), -8, 7).sum().backward()
    assert caplog.text.count("no C++ compiler") == 1
    assert x.grad is not None
    assert 0 < x.grad.mean() < 2


def test_the_environment_turns_compilation_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_KERNELS", "off")
    assert not kernels.available(False, "rows")
    taken = fast.plan(torch.zeros(N), (), False)
    assert taken is not None
    assert taken.form == "blocked"
