# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vlmcompress.eval.latency import Timing, interleaved, milliseconds, peak_bytes, refuse_zeros, tensor_shapes


def test_rounds_are_interleaved_and_the_warm_up_is_dropped():
    order = []

    def case(name):
        return lambda: order.append(name) or float(len(order))

    found = interleaved({n: case(n) for n in "abc"}, rounds=2, warmup=1)
    assert "".join(order) == "abcbcacab"
    assert found == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}


def test_a_timing_is_a_median():
    timing = Timing.of([1.0, 2.0, 100.0])
    assert (timing.median, timing.runs) == (2.0, 3)


def test_the_clock_runs():
    assert milliseconds(lambda: torch.randn(400, 400) @ torch.randn(400, 400)) > 0


def test_zeros_are_refused():
    refuse_zeros({"pixel_values": torch.ones(1, 3), "mask": torch.zeros(3, dtype=torch.long)})
    with pytest.raises(ValueError, match="'pixel_values' holds nothing but zeros"):
        refuse_zeros({"pixel_values": torch.zeros(1, 3)})


def test_peak_memory_sees_what_is_freed_again():
    def run():
        big = torch.ones(1 << 20)
        return big.sum()

    assert 4 << 20 <= peak_bytes(run) < 5 << 20


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_peak_memory_sees_tensors_without_a_storage():
    given = torch.ones(1 << 10, 1 << 10)
    assert 8 << 20 <= peak_bytes(lambda: given.to_mkldnn().to_dense()) < 9 << 20


def test_shapes_are_seen():
    with tensor_shapes() as shapes:
        torch.ones(3, 4) @ torch.ones(4, 5)
    assert (3, 5) in shapes
    assert (5, 3) not in shapes
