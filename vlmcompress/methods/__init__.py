# SPDX-License-Identifier: Apache-2.0
"""Published methods, one file each. Importing the package registers all of them.

``vlmcompress.methods()`` is also a call of the public contract, so this package can be called.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


class _CallablePackage(ModuleType):
    def __call__(self):
        """Every registered method by name."""
        from ..catalog import methods

        return methods()


sys.modules[__name__].__class__ = _CallablePackage

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
