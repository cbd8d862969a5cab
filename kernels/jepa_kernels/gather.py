"""Gather the visible tokens of every sample: y[b, k, :] = x[b, index[b, k], :].

Shapes: B samples, N tokens, K kept tokens, D channels. A pure copy, so the floor is memory traffic: K rows
read and K rows written per sample. The CPU kernel is in csrc/gather.cpp.
"""

import torch
from torch import Tensor
