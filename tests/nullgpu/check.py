"""Checks that the null GPU does what its README says: tests/nullgpu/run PYTHON tests/nullgpu/check.py

Each check is one claim about the stubs, made of torch. It takes a minute, most of it torch.compile's.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

import nullgpu
import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from triton import language as tl

GIB = 2**30


@contextmanager
def counted(**wanted: int) -> Iterator[None]:
    """Fails if the counters named do not rise by exactly this much."""
    before = nullgpu.counts()
    yield
    found = nullgpu.since(before)
    assert all(found.get(name, 0) == count for name, count in wanted.items()), f"{wanted} wanted, {found} found"


@contextmanager
def refused(error: type[Exception], words: str) -> Iterator[None]:
    try:
        yield
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(f"no {error.__name__}")


def copies_and_syncs() -> None:
    values = torch.tensor([random.randrange(10**6) for _ in range(1000)])
    with counted(h2d=1, pageable=1, stream_sync=1):
        on_device = values.cuda()
    with counted(d2h=1, stream_sync=1):
        assert on_device.cpu().equal(values)
    pinned = values.pin_memory()
    assert pinned.is_pinned() and not values.is_pinned()
    with counted(h2d=1, pageable=0, stream_sync=0):
        pinned.to("cuda", non_blocking=True)
    with counted(d2d=1):
        assert on_device.clone().tolist() == values.tolist()
    with counted(device_sync=1):
        torch.cuda.synchronize()


def streams_and_events() -> None:
    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), counted(launch=1):
        stream.wait_event(first)
        torch.ones(8, device="cuda")
        second.record()
    with counted(event_sync=1, stream_sync=1):
        second.synchronize()
        stream.synchronize()
    assert first.elapsed_time(second) > 0


def products() -> None:
    square = torch.ones(64, 64, device="cuda")
    with counted(gemm=4):
        square @ square
        square.bfloat16() @ square.bfloat16()
        torch.nn.functional.linear(square, square, square[0])
        torch.bmm(square[None], square[None])


def memory() -> None:
    total = torch.cuda.mem_get_info()[1]
    half = total // 2
    blocks = [torch.empty(half // 4, dtype=torch.uint8, device="cuda") for _ in range(4)]
    assert half <= torch.cuda.memory_reserved() < half + GIB // 4
    assert torch.cuda.memory_snapshot()[0]["is_expandable"]
    with refused(torch.OutOfMemoryError, "out of memory"):
        torch.empty(half, dtype=torch.uint8, device="cuda")
    del blocks[1], blocks[2]
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < half // 2 + GIB // 4
    torch.empty(half, dtype=torch.uint8, device="cuda")
    del blocks
    torch.cuda.empty_cache()


def attention() -> None:
    q, k, v = (torch.randn(2, 4, 96, 80, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), counted(gemm=0):
        scaled_dot_product_attention(q, k, v).sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


def compiled() -> None:
    x, w = (torch.randn(64, 64, device="cuda", requires_grad=True) for _ in range(2))

    @torch.compile(fullgraph=True)
    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (layer_norm(x, (64,)) @ w).square().sum()

    for _ in range(2):
        loss(x, w).backward()
    before = nullgpu.counts()
    loss(x, w).backward()
    found = nullgpu.since(before)
    assert found["triton"] >= 2 and found["gemm"] == 3 and "stream_sync" not in found, found


@triton.jit
def nothing(pointer):  # type: ignore[no-untyped-def]  # triton reads annotations
    tl.store(pointer, 1)


def kernels() -> None:
    with counted(triton=1, launch=0):
        nothing[(1,)](torch.empty(1, device="cuda"))
    with refused(ValueError, "cpu tensor"):
        nothing[(1,)](torch.zeros(1))


def graphs() -> None:
    x, graph = torch.zeros(8, 8, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (x @ x).relu()
    with counted(graph_launch=1, launch=0, gemm=0):
        graph.replay()
    # Last: torch keeps traces of a capture that failed.
    with refused(RuntimeError, "capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.cuda.synchronize()


for check in (copies_and_syncs, streams_and_events, products, memory, attention, compiled, kernels, graphs):
    check()
    print("ok", check.__name__, flush=True)
