"""What this process has asked of the GPU that computes nothing.

before = nullgpu.counts()
step()
print(nullgpu.since(before))  # {"h2d": 4, "launch": 1290, "triton": 911, ...}
"""

import ctypes

_process = ctypes.CDLL(None)
try:
    _process.nullgpu_counted.restype = ctypes.c_long
    _names = ctypes.cast(_process.nullgpu_counter_names, ctypes.POINTER(ctypes.c_char_p))
except AttributeError:
    raise ImportError("this process has no null GPU: start it with tests/nullgpu/run PYTHON ...") from None

NAMES: list[str] = []
"""Of the counters, in the order of nullgpu.h, which says what each counts."""
while (name := _names[len(NAMES)]) is not None:
    NAMES.append(name.decode())


def counts() -> dict[str, int]:
    """Every counter since the process began."""
    return {name: _process.nullgpu_counted(index) for index, name in enumerate(NAMES)}


def since(before: dict[str, int]) -> dict[str, int]:
    """By how much each counter rose since `before`, of those that did."""
    now = counts()
    return {name: now[name] - before[name] for name in NAMES if now[name] != before[name]}
