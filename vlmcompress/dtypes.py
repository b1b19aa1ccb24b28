# SPDX-License-Identifier: Apache-2.0
"""Names for annotations."""

from __future__ import annotations

from typing import TypeAlias

import torch

#: an int64 tensor; torch's own ``LongTensor`` class is a relic that no operation is typed to return
LongTensor: TypeAlias = torch.Tensor
