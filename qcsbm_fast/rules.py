"""Rules by which torch's functions push a `Dual`: a module written for tensors runs on duals, call by call.

A call `y = f(x)` with tangents `t_k` becomes

* linear (views, sums, resampling, convolution, products with weights): `f(t_k)`, all tangents in one call;
* a product of two duals: the sum of what each does with the other held;
* elementwise: `f'(x) t_k`, the slope by one forward-mode pass along a tangent of ones;
* normalisation with SiLU, softmax: the package's fused ops, which read the primal once;
* any other function of torch: PyTorch's forward mode through that call alone, once per tangent.

The primal runs once for all tangents but in the last case, and through the same functions as on tensors. What a rule
would get wrong raises `DualUnsupported`: custom ops, in-place calls on memory that another dual shows, gradients and
hooks inside the module, parts without a graph. `linearize.push` then takes the slower way for the whole function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from . import dual
from .dual import Dual, DualUnsupported
from .foreign import forward_mode, rewinder
from .fused_rules import FUSED, duals, only_first

# The functions and methods of each kind, by name.
_NAMES = {
    "views": "reshape view permute transpose swapaxes swapdims movedim flatten unflatten unsqueeze "
    "squeeze expand chunk split tensor_split unbind narrow select getitem t ravel contiguous to type float double "
    "half bfloat16",
    "linear": "sum mean cumsum flip roll repeat tile repeat_interleave index_select clone neg negative",
    "on images": "interpolate pad avg_pool2d adaptive_avg_pool2d pixel_shuffle pixel_unshuffle",
    "weighted": "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    "products": "matmul mm bmm einsum",
    "elementwise": "relu sigmoid tanh exp gelu elu selu celu softplus softsign log log1p expm1 sqrt rsqrt square abs "
    "sin cos sinh cosh atan erf reciprocal pow clamp clamp_min clamp_max hardtanh relu6 hardswish mish "
    "leaky_relu logsigmoid tanhshrink",
    "constant": "detach gt lt ge le eq ne isnan isfinite argmax zeros_like ones_like empty_like rand_like randn_like "
    "new_zeros new_ones new_empty new_full",
    "dropout": "dropout dropout1d dropout2d dropout3d feature_dropout",
    "joins": "cat concat concatenate stack hstack vstack",
    "of the primal": "dim ndimension size numel nelement is_floating_point is_complex is_contiguous stride get_device "
    "element_size ndim is_cuda is_cpu is_mps is_meta layout is_sparse is_quantized is_nested itemsize nbytes "
    "requires_grad",
    "refused": "grad backward requires_grad_ register_hook retain_grad detach_ data grad_fn is_leaf numpy data_ptr "
    "as_strided",
}
_REFUSED, _OF_THE_PRIMAL = (set(_NAMES[kind].split()) for kind in ("refused", "of the primal"))
_TRANSPOSED = ("T", "mT", "H", "mH")


def attribute(x: Dual, name: str) -> Any:
    """The method or property `name` of a tensor, for the dual `x`."""
    if name in _TRANSPOSED:
        return _linear(lambda value: getattr(value, name), (x,), {}, shares=True)
    found = getattr(Tensor, name, None)
    if found is None or name in _REFUSED or name.startswith("_"):
        raise DualUnsupported(f"Tensor.{name} is not pushed through a Dual")
    if name in _OF_THE_PRIMAL:
        return getattr(x.primal, name)
    if not callable(found):
        raise DualUnsupported(f"Tensor.{name} is not pushed through a Dual")
    return partial(_method, found, x)


def _method(func: Callable[..., Any], x: Dual, *args: Any, **kwargs: Any) -> Any:
    return apply(func, (x, *args), kwargs)


def apply(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`, a call of torch with duals among its arguments.

    Raises:
        DualUnsupported, NotImplementedError, RuntimeError: where it is not pushed.
    """
    name = getattr(func, "__name__", "").partition(".")[0]
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        known = str(func).startswith("aten.")
    else:
        known = f"{getattr(func, '__module__', None) or 'torch'}.".startswith("torch.")
    if not known or name in _REFUSED or kwargs.get("out") is not None:
        raise DualUnsupported(f"{name or func} is not pushed through a Dual")
    if not torch.is_grad_enabled():
        for x in duals(args, kwargs):
            x.require_graph()
    inplace = bool(kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))
    if inplace or name == "__setitem__":
        return _in_place(func, name, args, kwargs)
    rule = _RULES.get(name) or _RULES.get(name.strip("_"))
    result = rule(func, args, kwargs) if rule is not None and args else NotImplemented
    return _forward_mode(func, args, kwargs) if result is NotImplemented else result


def _each(function: Callable[..., Any], *tangents: Tensor) -> Any:
    """`function` of the tangents of one probe, for all probes."""
    if tangents[0].shape[0] == 1:  # without vmap's overhead
        return tree_map(lambda value: value[None], function(*(t[0] for t in tangents)))
    return torch.func.vmap(function)(*tangents)


def _pair(primal: Any, tangents: Any) -> Any:
    """A dual, or a tuple of duals."""
    if isinstance(primal, Tensor):
        return Dual(primal, tangents)
    return tuple(Dual(p, t) for p, t in zip(primal, tangents, strict=True))


def _linear(func: Any, args: Any, kwargs: dict[str, Any], shares: bool = False) -> Any:
    if not only_first(args, kwargs):
        return NotImplemented
    x, *rest = args
    if func is Tensor.view:  # the tangents may lie otherwise in memory
        if any(isinstance(value, torch.dtype) for value in rest):
            raise DualUnsupported("Tensor.view as another dtype is not pushed through a Dual")
        func = Tensor.reshape
    primal = func(x.primal, *rest, **kwargs)
    if primal is x.primal:
        return x
    kwargs.pop("memory_format", None)  # vmap knows none but the default
    parts = primal if isinstance(primal, (tuple, list)) else [primal]
    if not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
        return primal
    result = _pair(primal, _each(lambda t: func(t, *rest, **kwargs), x.tangents))
    if shares:
        x.share(*duals(result))
    return result


def _on_images(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Linear functions of images: the tangents are one batch of `K B`."""
    adds = kwargs.get("value") or kwargs.get("mode", "constant") != "constant" or len(args) > 3
    if not only_first(args, kwargs) or args[0].primal.dim() != 4 or (func is F.pad and adds):
        return NotImplemented
    x, *rest = args
    if func is F.pad and len(rest[0] if rest else kwargs["pad"]) > 6:
        return NotImplemented
    moved = func(x.tangents.flatten(0, 1), *rest, **kwargs)
    return Dual(func(x.primal, *rest, **kwargs), moved.unflatten(0, x.tangents.shape[:2]))


def _weighted(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Linear layers and convolutions: the tangents lose the bias."""
    if not only_first(args, kwargs) or (func is not F.linear and args[0].primal.dim() != args[1].dim()):
        return NotImplemented
    x, weight, *rest = args
    unbiased = {name: value for name, value in kwargs.items() if name != "bias"}
    tangents, batch = x.tangents, x.tangents.shape[:2]
    moved = func(tangents.flatten(0, 1), weight, *([None, *rest[1:]] if rest else []), **unbiased)
    return Dual(func(x.primal, weight, *rest, **kwargs), moved.unflatten(0, batch))


def _products(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Functions linear in each of their duals: the sum of what each tangent gives with the others held."""
    flat, spec = tree_flatten(args)
    held = [leaf.primal if isinstance(leaf, Dual) else leaf for leaf in flat]

    def call(index: int, value: Tensor) -> Tensor:
        return func(*tree_unflatten([*held[:index], value, *held[index + 1 :]], spec), **kwargs)

    terms = [_each(partial(call, i), leaf.tangents) for i, leaf in enumerate(flat) if isinstance(leaf, Dual)]
    return Dual(func(*tree_unflatten(held, spec), **kwargs), reduce(torch.add, terms))


def _elementwise(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if not only_first(args, kwargs):
        return NotImplemented
    x, *rest = args
    with forward_ad.dual_level():
        pushed = forward_ad.make_dual(x.primal, torch.ones_like(x.primal))
        value, slope = forward_ad.unpack_dual(func(pushed, *rest, **kwargs))
    slope = torch.zeros_like(value) if slope is None else slope
    return Dual(value, x._widened(value.dim()) * slope)


def _binary(method: str, *, swapped: bool = False) -> Callable[..., Any]:
    """A sum, difference, product or quotient, whose first argument may be the plain one.

    As a method: torch.compile brings every operator of a dual here, and swaps a dual that comes first with the other.
    """

    def rule(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs or len(args) != 2:
            return NotImplemented
        a, b = reversed(args) if swapped else args
        if isinstance(a, Dual):
            return getattr(a, f"__{method}__")(b)
        return getattr(b, f"__r{method}__")(a)

    return rule


def _dropout(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One mask for the primal and all tangents."""
    x, *rest = args
    p, training = [*rest, *(0.5, True)[len(rest) :]][:2]
    if kwargs.get("p", p) == 0 or not kwargs.get("training", training):
        return x
    return x * func(torch.ones_like(x.primal), *rest, **kwargs)


def _join(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Concatenations and stacks: what is plain has zero tangents."""
    values, *rest = args
    dim = rest[0] if rest else kwargs.get("dim", 0)
    moving = duals(values)
    if func in (torch.cat, torch.concat, torch.concatenate) and dim % moving[0].primal.dim():
        return dual.cat(values, dim)
    held = [value.primal if isinstance(value, Dual) else value for value in values]

    def join(*tangents: Tensor) -> Tensor:
        own = iter(tangents)
        return func(
            [next(own) if isinstance(v, Dual) else torch.zeros_like(v) for v in values], *rest, **kwargs
        )

    return Dual(func(held, *rest, **kwargs), _each(join, *(value.tangents for value in moving)))


def _constant(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What no gradient flows through; `detach` shows the memory of its argument."""
    for x in duals(args, kwargs):
        x.share()
    args, kwargs = tree_map(lambda leaf: leaf.primal if isinstance(leaf, Dual) else leaf, (args, kwargs))
    return func(*args, **kwargs)


def _in_place(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """The same out of place, and then the dual holds the result."""
    target, again = args[0], bool(kwargs.get("inplace"))
    homes = [home for home in (torch, Tensor, F) if hasattr(home, name[:-1])]
    if not isinstance(target, Dual) or name in ("__setitem__", "copy_", "fill_") or not (again or homes):
        raise DualUnsupported(f"{name} is not done in place on a Dual")
    result = (
        apply(func, args, {**kwargs, "inplace": False})
        if again
        else apply(getattr(homes[0], name[:-1]), args, kwargs)
    )
    if not isinstance(result, Dual):
        raise DualUnsupported(f"{name} is not done in place on a Dual")
    return target.assign(result)


def _forward_mode(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """PyTorch's forward mode through this call, once per tangent; what has no tangent comes back as a plain value."""
    flat, spec = tree_flatten((args, kwargs))
    given = [leaf for leaf in flat if isinstance(leaf, Dual)]
    rewind = rewinder(given[0].device)
    results, form = [], None
    for k in range(given[0].tangents.shape[0]):
        rewind()
        with forward_mode():
            pushed = [
                forward_ad.make_dual(leaf.primal, leaf.tangents[k]) if isinstance(leaf, Dual) else leaf
                for leaf in flat
            ]
            its_args, its_kwargs = tree_unflatten(pushed, spec)
            outputs, form = tree_flatten(func(*its_args, **its_kwargs))
            results.append(
                [forward_ad.unpack_dual(out) if isinstance(out, Tensor) else (out, None) for out in outputs]
            )
    found = []
    for pairs in zip(*results, strict=True):
        value, tangent = pairs[0]
        found.append(value if tangent is None else Dual(value, torch.stack([t for _, t in pairs])))
    storages = {leaf.primal.untyped_storage().data_ptr() for leaf in given}
    shown = [out for out in duals(found) if out.primal.untyped_storage().data_ptr() in storages]
    if shown:
        for x in given:
            x.share(*shown)
    assert form is not None
    return tree_unflatten(found, form)


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_NAMES["views"].split(), partial(_linear, shares=True)),
    **dict.fromkeys(_NAMES["linear"].split(), _linear),
    **dict.fromkeys(_NAMES["on images"].split(), _on_images),
    **dict.fromkeys(_NAMES["weighted"].split(), _weighted),
    **dict.fromkeys(_NAMES["products"].split(), _products),
    **dict.fromkeys(_NAMES["elementwise"].split(), _elementwise),
    **dict.fromkeys(_NAMES["dropout"].split(), _dropout),
    **dict.fromkeys(_NAMES["joins"].split(), _join),
    **dict.fromkeys(_NAMES["constant"].split(), _constant),
    **FUSED,
}
_RULES |= {name: _binary(method) for name, method in (
    ("add", "add"), ("sub", "sub"), ("subtract", "sub"), ("mul", "mul"), ("multiply", "mul"), ("div", "truediv"),
    ("divide", "truediv"), ("true_divide", "truediv"),
)}  # fmt: skip
_RULES |= {"rsub": _binary("sub", swapped=True), "rdiv": _binary("truediv", swapped=True)}
