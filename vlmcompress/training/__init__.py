# SPDX-License-Identifier: Apache-2.0
"""Training of the small models that the project ships (needs the extra ``train``)."""
