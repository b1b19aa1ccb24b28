# SPDX-License-Identifier: Apache-2.0
"""Measuring: FLOPs, clocks, accuracy with intervals, and the reports made of them (installed as ``vlmcompress.eval``)."""
