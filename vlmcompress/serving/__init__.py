# SPDX-License-Identifier: Apache-2.0
"""Compressed models in servers: a plug-in for vLLM, and an encoder whose embeddings other servers take."""
