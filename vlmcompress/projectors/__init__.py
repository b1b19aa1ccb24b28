# SPDX-License-Identifier: Apache-2.0
"""Trained projectors that turn a tower's features into fewer visual tokens."""
