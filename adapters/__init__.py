# SPDX-License-Identifier: Apache-2.0
"""One file per model family. An adapter says where things are in a model; it never names a method.

Importing the package registers all of them.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
