# SPDX-License-Identifier: Apache-2.0
"""Measuring: FLOPs, clocks, accuracy with intervals, and their reports (installed as ``vlmcompress.eval``)."""
