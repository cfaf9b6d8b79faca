"""A CUDA device that only pretends: it knows shapes, dtypes and devices, computes nothing, and notes when the host would wait.

    with FakeCuda() as gpu:             # tensors of the CPU stay real; what is on "cuda" is a FakeTensor
        step.accumulate(…)
    assert gpu.waits == []              # nothing on the device was asked for
    assert gpu.blocking_uploads == []   # each copy to it was non_blocking, from pinned memory

What this proves of the code that runs inside: no operation mixes devices (FakeTensorMode raises), none makes the host wait for
values of the device, every upload may overlap; and the same of the formulas of the backward pass, which `backward` below calls
node by node, since autograd's own engine would look for a CUDA context.

What it does not prove: numbers; kernels and what they do inside, such as a wait within cuBLAS; DataLoader's thread that pins
batches (it finds no GPU, so they are pinned where they are uploaded); streams and events; memory; torch.compile and NCCL.
tools/gpu_check.py and the tests marked `gpu` are for those. Three things are replaced because they need a driver: whether
autocast and GradScaler find a GPU, `torch.Generator("cuda")` (one of the CPU stands in), and `torch.cuda.mem_get_info`.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN, PRIM = torch.ops.aten, torch.ops.prim
CUDA = torch.device("cuda", 0)
M = TypeVar("M", bound=nn.Module)

VALUE_ON_THE_HOST = {
    ATEN._local_scalar_dense, ATEN.is_nonzero, ATEN.equal, ATEN.nonzero, ATEN.masked_select, ATEN._linalg_check_errors,
    ATEN._unique2, ATEN.unique_dim, ATEN.unique_consecutive, ATEN.bincount, ATEN.histc,
}  # fmt: skip
"""What needs to know values to go on: the host waits for the device, where they are."""


class SharedFakeMode(FakeTensorMode):
    """One for all tensors, also for copies of modules: copy.deepcopy would copy the mode of a parameter, too."""

    def __deepcopy__(self, memo: object) -> "SharedFakeMode":
        return self


class FakeCuda(TorchDispatchMode):
    """See above. Whatever is fetched from the device is `value`, so that code that wants a number goes on."""

    def __init__(self, value: int = 1) -> None:
        super().__init__()
        self.value = value
        self.fake = SharedFakeMode(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self.blocking_uploads: list[str] = []
        self.uploads = 0
        self._pinned: list[torch.UntypedStorage] = []  # kept, so that no address is used twice
        self._opened = contextlib.ExitStack()

    def forget(self) -> None:
        """Count anew: what happens once, when a model or reader is made, may wait."""
        self.waits, self.blocking_uploads, self.uploads = [], [], 0

    def __enter__(self) -> "FakeCuda":
        lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor(…, device="cuda") is made here and uploaded, as it really is
        self._opened.callback(torch._C._set_only_lift_cpu_tensors, lift)
        torch._C._ensureCUDADeviceGuardSet()
        for patched in (
            patch("torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            patch("torch.amp.grad_scaler.torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            patch("torch.cuda.is_bf16_supported", lambda *_: True),
            patch("torch.cuda.mem_get_info", lambda *_: (2**40, 2**40)),
            patch("torch.Generator", HostGenerator),
            *(() if torch.cuda.is_available() else (patch("torch.cuda._lazy_init", lambda: None),)),
        ):
            self._opened.enter_context(patched)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._opened.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        if packet is PRIM.device:
            return kind_of(args[0])
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if packet is ATEN.is_pinned:
            return self._is_pinned(tensors[0])
        if packet is ATEN._pin_memory:
            return self._pin(torch.empty_like(tensors[0]).copy_(tensors[0]))
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **{**kwargs, "pin_memory": False}))
        on_device = [tensor for tensor in tensors if kind_of(tensor).type == "cuda"]
        to = [leaf for leaf in leaves if isinstance(leaf, torch.device) and leaf.type == "cuda"]
        if not on_device and not to:
            return func(*args, **kwargs)  # the host's own business, in earnest

        if packet in (ATEN._to_copy, ATEN.copy_):
            source, target = tensors[-1], (to or [kwargs.get("device") or kind_of(tensors[0])])[0]
            if kind_of(source).type == "cpu" and target.type == "cuda":
                return self._upload(func, args, kwargs, source)
            if kind_of(source).type == "cuda" and target.type == "cpu":
                return self._download(func, args, kwargs, source)
        if packet in VALUE_ON_THE_HOST:
            self._note(self.waits, func)
        if packet is ATEN._local_scalar_dense:
            return torch.full((), self.value, dtype=tensors[0].dtype).item()
        if packet in (ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_):
            for index in (leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)):
                if kind_of(index).type == "cpu":  # the kernel uploads it
                    self._note(self.blocking_uploads, func)
                elif index.dtype in (torch.bool, torch.uint8):  # and counts its ones
                    self._note(self.waits, func)
        with self.fake:
            return func(*args, **kwargs)

    def _upload(self, func, args, kwargs, source: Tensor):
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        self.uploads += 1
        # A number in an operation with tensors of the device travels with the kernel's arguments; one that is copied does not.
        if not (non_blocking and self._is_pinned(source)):
            self._note(self.blocking_uploads, func)
        with self.fake:
            return func(*args, **kwargs)

    def _download(self, func, args, kwargs, source: Tensor):
        if not kwargs.get("non_blocking", len(args) > 2 and args[2]):
            self._note(self.waits, func)
        if func.overloadpacket is ATEN.copy_:
            return args[0].fill_(self.value)
        return torch.full(source.shape, self.value, dtype=kwargs.get("dtype") or source.dtype)

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned.append(tensor.untyped_storage())
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor):
            return False
        return tensor.untyped_storage().data_ptr() in {storage.data_ptr() for storage in self._pinned}

    @staticmethod
    def _note(notes: list[str], func: object) -> None:
        ours = [
            frame
            for frame in traceback.extract_stack()
            if "/vaetrain/" in frame.filename and "/.venv/" not in frame.filename
        ]
        ours = [frame for frame in ours if not frame.filename.endswith("fake_cuda.py")]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].line}" if ours else "?"
        notes.append(f"{func} at {where}")


def kind_of(tensor: Tensor) -> torch.device:
    """Its device, asked for without an operation for the mode to see: most of the time went there."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


_Generator = torch.Generator


class HostGenerator:
    """torch.Generator, on the CPU whatever device is asked for."""

    def __new__(cls, device: object = "cpu") -> torch.Generator:
        return _Generator()


def backward(root: Tensor) -> None:
    """Add the gradients of a scalar to its leaves, as Tensor.backward does, without autograd's engine."""
    waiting_for: Counter[object] = Counter()  # nodes by the edges that lead to them
    seen, stack = {root.grad_fn}, [root.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting_for[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    gradients: dict[object, dict[int, Tensor]] = {root.grad_fn: {0: torch.ones_like(root)}}
    ready = [root.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            given = gradients.pop(node, {})
            if hasattr(node, "variable"):  # AccumulateGrad, a leaf's
                leaf, gradient = node.variable, given.get(0)
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
                continue
            inputs = [given.get(number) for number in range(len(node._input_metadata))]
            found = node(*inputs) if given else (None,) * len(node.next_functions)
            edges = zip(node.next_functions, found if isinstance(found, tuple) else (found,), strict=True)
            for (following, number), gradient in edges:
                if following is None:
                    continue
                if gradient is not None:
                    wanted, own = following._input_metadata[number], gradients.setdefault(following, {})
                    assert kind_of(gradient) == wanted.device
                    # What was broadcast is summed, as the engine does it between any two nodes.
                    if gradient.shape != wanted.shape:
                        gradient = gradient.sum_to_size(wanted.shape)
                    gradient = gradient.to(wanted.dtype)
                    own[number] = own[number] + gradient if number in own else gradient
                waiting_for[following] -= 1
                if waiting_for[following] == 0:
                    ready.append(following)


def on_device(make: Callable[[], M]) -> M:
    """A module on the device, its kernels laid out channels last. Without Module.to, which cannot swap tensors that pretend."""
    with torch.device("meta"):
        made = make()
    for module in made.modules():
        for name, weight in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
            tensor = torch.empty(weight.shape, dtype=weight.dtype, device=CUDA, memory_format=layout)
            setattr(module, name, nn.Parameter(tensor) if isinstance(weight, nn.Parameter) else tensor)
    return made
