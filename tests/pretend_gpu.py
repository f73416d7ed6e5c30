"""A CUDA device that is not there: tensors that say they lie on it, and compute on this CPU.

What a real one refuses is refused: operands on different devices, and numbers read without a copy
to the CPU first. What only it has (its fused kernels, free memory, waiting for it) is stood in for.
So a whole unit runs as on a GPU, and a tensor that was left on the wrong device is found.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
READS = {"numpy", "__array__"}
MOVES = {"to", "copy_", "cpu", "cuda"}
INDEXED = {"__getitem__", "__setitem__", "index_put_", "index_put"}


class OnGpu(Tensor):
    """A tensor `held` on the CPU that calls itself one on the GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype
        )
        made.held = held
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return _called(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # There are no numbers below: all is computed by `_called`.
        raise RuntimeError(f"{func} was reached with a tensor that is not there")


class _Calls(TorchFunctionMode):
    """Sees what is made out of nothing, which has no tensor to say where it goes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return _called(func, args, kwargs or {})


def _called(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As the devices would, or the error that they would raise."""
    name = func.__name__
    on_gpu = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, OnGpu)]
    if on_gpu and func in PROPERTIES:
        return PROPERTIES[func]
    if on_gpu and name in READS:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use .cpu() first")
    if name not in MOVES:
        _refuse_mixed(name, args, kwargs)
    place = _place(name, args, kwargs, bool(on_gpu))
    plain_args, plain_kwargs = tree_map_only(OnGpu, lambda t: t.held, (args, kwargs))
    if name == "to":
        plain_args = tuple(CPU if isinstance(x, str | torch.device) else x for x in plain_args)
    if kwargs.get("device") is not None:
        plain_kwargs["device"] = CPU
    out = KERNELS.get(name, func)(*plain_args, **plain_kwargs)
    if name in MOVES and isinstance(args[0], OnGpu) != (place.type == "cuda"):
        out = out.clone()
    same = {id(tensor.held): tensor for tensor in on_gpu}

    def put(tensor: Tensor) -> Tensor:
        if place.type == "cpu":
            return tensor
        return same[id(tensor)] if id(tensor) in same else OnGpu(tensor)

    return tree_map_only(Tensor, put, out)


def _place(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], on_gpu: bool) -> torch.device:
    """Where the result goes."""
    if name in ("cpu", "cuda"):
        return CPU if name == "cpu" else GPU
    asked = kwargs.get("device")
    if name == "to":
        for given in (*args[1:], kwargs.get("other")):
            if isinstance(given, str | torch.device):
                asked = given
            elif isinstance(given, Tensor):
                asked = GPU if isinstance(given, OnGpu) else CPU
    if asked is not None:
        return torch.device(asked)
    if name in MOVES | INDEXED:
        return GPU if isinstance(args[0], OnGpu) else CPU
    return GPU if on_gpu else CPU


def _refuse_mixed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A CPU's single number may be among a GPU's tensors, and a CPU's indices may index them."""
    if name in INDEXED and isinstance(args[0], OnGpu):
        args = (args[0], *args[2:])
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    places = {isinstance(t, OnGpu) for t in given if t.dim() or isinstance(t, OnGpu)}
    if len(places) > 1:
        shapes = [(tuple(t.shape), "cuda" if isinstance(t, OnGpu) else "cpu") for t in given]
        raise RuntimeError(f"{name}: expected all tensors to be on the same device: {shapes}")


def _flash(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool, *, scale: float
) -> tuple[Tensor, ...]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, causal, scale=scale
    )
    return out, lse, *(torch.zeros(0) for _ in range(7))


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: None, sums: bool, dropout: float,
    causal: bool, *, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert bias is None
    assert sums
    out, lse, *_ = _flash(query, key, value, dropout, causal, scale=scale)
    padded = nn.functional.pad(lse, (0, -lse.shape[-1] % 32))
    return out, padded, torch.zeros(0), torch.zeros(0)


KERNELS: dict[str, Callable[..., Any]] = {
    "cuda": lambda tensor, *_: tensor,
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_efficient_attention": _efficient,
}
PROPERTIES = {Tensor.device.__get__: GPU, Tensor.is_cuda.__get__: True}


@contextmanager
def pretending(free_bytes: int = 80 * 10**9) -> Iterator[None]:
    """Within, there is one GPU with this much memory free."""
    answers: dict[str, Callable[..., object]] = {
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (free_bytes, free_bytes),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        with _Calls():
            yield


def moved(model: nn.Module) -> None:
    """All weights and buffers of a model, in place."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                held = OnGpu(parameter.detach())
                module._parameters[name] = nn.Parameter(held, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = OnGpu(buffer)
