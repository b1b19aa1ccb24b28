# SPDX-License-Identifier: Apache-2.0
"""The machinery between methods and models: it knows neither a method nor a model family by name."""
