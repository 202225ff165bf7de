"""Public ops under arguments that nobody would give: an error, or the reference's answer; never a crash.

Each example takes a good call from the table of ops and spoils up to three of its arguments.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import TABLE, arguments, outputs
from entry import allowance
from qcsbm_fast import asymmetry
from qcsbm_fast.divergence import divergence
from qcsbm_fast.ops.registry import Op

PUBLIC = [
    (n, v, s) for n, e in TABLE.items() if e.public for v in e.variants for s in e.sizes if s != "large"
]
REFUSALS = (ValueError, TypeError, NotImplementedError, OverflowError, RuntimeError, MemoryError)
HUGE = 1 << 56  # elements: more than any address space holds


def fill(value: float) -> Callable[[Tensor], Tensor]:
    def replace(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[::3] = value
        return x

    return replace


LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "every second": lambda x: torch.stack((x, torch.full_like(x, 7)), -1)[..., 0],
    "repeated": lambda x: x[:1].expand(x.shape),
    "last first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "reversed": lambda x: (
        x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    ),
    "shifted": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "negated": lambda x: torch._neg_view(-x),
    "needs a gradient": lambda x: x.clone().requires_grad_(),
    "inference": lambda x: _inference(x),
}
SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "no rows": lambda x: x[:0],
    "one row less": lambda x: x[1:],
    "a number": lambda x: x.sum(),
    "flat": lambda x: x.flatten(),
    "deep": lambda x: x[(None,) * 5],
    "wide": lambda x: x.unsqueeze(-1),
    "huge": lambda x: x.expand(HUGE, *x.shape),
    "huge rows": lambda x: x[:1].expand(HUGE, *x.shape[1:]),
}
KINDS: dict[str, Callable[[Tensor], Any]] = {
    **{str(d): (lambda x, d=d: x.to(d)) for d in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64,
        torch.uint8, torch.float8_e4m3fn,
    )},
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "list": lambda x: x.tolist(),
    "array": lambda x: x.float().numpy(),
    "nothing": lambda _: None,
}  # fmt: skip
VALUES = {
    "nan": fill(torch.nan),
    "inf": fill(torch.inf),
    "zero": fill(0.0),
    "tiny": fill(1e-40),
}
TENSORS = {**LAYOUTS, **SHAPES, **KINDS, **VALUES}
OTHERS = (0, 1, -1, 1 << 31, (1 << 63) - 1, 2.0**70, 0.5, -1.5, torch.nan, torch.inf, None, "x", b"", [], [-1],
          [0], [HUGE], [1 << 33, 1 << 33], [2.0**70], ["x"], [torch.nan], torch.float32, torch.int32,
          object())  # fmt: skip


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def spoil(value: Any, choice: int) -> Any:
    """A replacement, or the value itself where this one cannot be made of it."""
    if not isinstance(value, Tensor):
        return OTHERS[choice % len(OTHERS)]
    try:
        return list(TENSORS.values())[choice % len(TENSORS)](value)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return value


def by_reference(public: Callable[..., Any], call: list[Any]) -> tuple[Tensor, ...]:
    native = Op.__call__
    Op.__call__ = lambda self, *a: self.reference(*a)
    try:
        return outputs(public(*call))
    finally:
        Op.__call__ = native


def assert_agree(name: str, got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        if a.device.type == "meta" or not a.numel():
            continue
        bad, a, b = ~b.isfinite(), a.detach().double(), b.detach().double()
        assert torch.equal(~a.isfinite(), bad), f"{name}: other entries are not finite"
        a, b = (torch.where(bad, 0.0, value) for value in (a, b))
        allowed = 16 * allowance(TABLE[name], got[0].dtype, got[0].dtype, float(b.abs().max()))
        assert float((a - b).abs().max()) <= allowed + 1e-35, name


def check(name: str, variant: str, size: str, dtype: torch.dtype, spoils: list[tuple[int, int]]) -> bool:
    """Whether the call was refused."""
    entry = TABLE[name]
    assert entry.public is not None
    call = list(arguments(entry, variant, entry.sizes[size], dtype))
    for position, choice in spoils:
        call[position % len(call)] = spoil(call[position % len(call)], choice)
    try:
        got = outputs(entry.public(*call))
    except REFUSALS:
        return True
    try:
        expected = by_reference(entry.public, call)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return False  # the reference alone inserts the zeros that it multiplies
    assert_agree(name, got, expected)
    return False


@settings(
    max_examples=600, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(
    st.sampled_from(PUBLIC),
    st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 999)), min_size=1, max_size=3),
)
def test_spoiled_calls(case: tuple[str, str, str], dtype: torch.dtype, spoils: list[tuple[int, int]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(*case, dtype, spoils)


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if entry.public])
@pytest.mark.filterwarnings("ignore")
def test_every_argument_spoiled_in_every_way(name: str) -> None:
    """One argument at a time; other layouts alone are no reason to refuse."""
    entry = TABLE[name]
    variant, size = next(iter(entry.variants)), "odd"
    good = list(arguments(entry, variant, entry.sizes[size], torch.float32))
    for position, value in enumerate(good):
        for choice in range(len(TENSORS) if isinstance(value, Tensor) else len(OTHERS)):
            refused = check(name, variant, size, torch.float32, [(position, choice)])
            if isinstance(value, Tensor) and list(TENSORS)[choice] in LAYOUTS:
                assert not refused, (position, list(TENSORS)[choice])


SHAPED = st.lists(st.sampled_from([0, 1, 2, 3, 5]), min_size=0, max_size=4)


@settings(
    max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(SHAPED, st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]), st.integers(-1, 3))
def test_asymmetry_and_divergence_of_any_batch(shape: list[int], dtype: torch.dtype, probes: int) -> None:
    """For the identity: penalty 0, divergence the dimension; or an error that names the argument."""
    x = torch.ones(shape, dtype=dtype)
    for function in (asymmetry, divergence):
        if not x.is_floating_point() or x.dim() < 2 or not x.numel() or probes < 1:
            with pytest.raises(ValueError, match=r"^(x|probes): expected"):
                function(lambda y: y * 1.0, x, probes=probes)
            continue
        result: Any = function(lambda y: y * 1.0, x, probes=probes)
        if function is asymmetry:
            assert torch.equal(result.penalty, torch.zeros_like(result.penalty))
        else:
            torch.testing.assert_close(result[1], torch.full((len(x),), float(x[0].numel()), dtype=dtype))


def test_the_table_of_spoils_is_what_it_says() -> None:
    """Each entry changes a good tensor, so that the other tests spoil something."""
    x = torch.arange(24.0).view(2, 3, 4) + 1
    for make, y in itertools.product(TENSORS.values(), (x,)):
        made = make(y)
        same = isinstance(made, Tensor) and made.layout == torch.strided and made.device == y.device
        same = same and made.shape == y.shape and made.dtype == y.dtype and made.stride() == y.stride()
        assert not same or made.storage_offset() or made.requires_grad or made.is_neg() or made.is_inference() or (
            not torch.equal(made, y) or make is KINDS["torch.float32"]
        )  # fmt: skip
