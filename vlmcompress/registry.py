# SPDX-License-Identifier: Apache-2.0
"""Names of methods and model families.

Built-in ones register by decorator when their module is imported; third parties add theirs through the entry-point
groups ``vlmcompress.methods``, ``vlmcompress.adapters`` and ``vlmcompress.encoders``, whose targets are imported on the
first look-up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name, filled by decorator, by the built-in packages and by one entry-point group."""

    def __init__(self, kind: str, group: str, builtin: tuple[str, ...]):
        self.kind, self.group, self.builtin = kind, group, builtin
        self._items: dict[str, type[T]] = {}
        self._loaded = self._loading = False
        self._lock = threading.RLock()  # a second thread waits until everything is there

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        def add(cls: type[T]) -> type[T]:
            taken = self._items.get(name)
            if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(
                    f"The {self.kind} name '{name}' is already taken by {taken.__module__}.{taken.__name__}."
                )
            self._items[name] = cls
            return cls

        return add

    def items(self) -> dict[str, type[T]]:
        """Every registered class by name, sorted, built-in and third-party alike."""
        with self._lock:
            if not self._loaded and not self._loading:
                self._loading = True
                try:
                    self._load()
                    self._loaded = True
                finally:
                    self._loading = False
            return dict(sorted(self._items.items()))

    def _load(self) -> None:
        for package in self.builtin:
            import_module(package)
        for point in entry_points(group=self.group):
            try:
                point.load()
            except Exception as error:
                package = point.dist.name if point.dist is not None else "unknown"
                raise ValueError(
                    f"The {self.kind} '{point.name}' of the installed package '{package}' cannot be loaded "
                    f"({type(error).__name__}: {error}); mend or uninstall that package."
                ) from error

    def get(self, name: str) -> type[T]:
        items = self.items()
        if name not in items:
            raise ValueError(f"There is no {self.kind} '{name}'; there is: {', '.join(items)}.")
        return items[name]


METHODS: Registry = Registry("method", "vlmcompress.methods", ("vlmcompress.methods", "vlmcompress.baselines"))
ADAPTERS: Registry = Registry("model family", "vlmcompress.adapters", ("vlmcompress.adapters",))
ENCODERS: Registry = Registry("kind of image encoder", "vlmcompress.encoders", ("vlmcompress.adapters",))


def register_method(name: str):
    """Class decorator: make a :class:`~vlmcompress.method.Method` available to ``compress`` under ``name``."""

    def add(cls):
        cls.name = name
        return METHODS.register(name)(cls)

    return add


def register_adapter(model_type: str):
    """Class decorator: serve the models whose ``config.model_type`` is ``model_type`` with this adapter."""

    def add(cls):
        cls.model_type = model_type
        return ADAPTERS.register(model_type)(cls)

    return add


def register_encoder(name: str):
    """Class decorator: serve the image encoders without a language model that the adapter's ``claims`` says yes to."""

    def add(cls):
        cls.model_type = name
        return ENCODERS.register(name)(cls)

    return add
