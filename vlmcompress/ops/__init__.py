# SPDX-License-Identifier: Apache-2.0
"""Pure tensor functions; nothing here imports transformers or knows a model."""
