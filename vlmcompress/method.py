# SPDX-License-Identifier: Apache-2.0
"""What a compression method is: a frozen dataclass that acts at one or more of the four stages.

A method never names a model. It is handed views of what passes through the model (:class:`TowerLayer`,
:class:`EntryTokens`, :class:`PrefillLayer`, :class:`CacheLayer`) and answers with what should stay. ``state`` is a dict
of its own that lives for one forward pass, so a method object carries no mutable state and can serve many models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from .options import check_types, tuples_of_lists

if TYPE_CHECKING:
    from .adapters.base import Adapter
    from .dtypes import LongTensor
    from .views import (
        AttendLayer,
        CacheLayer,
        Cut,
        EntryTokens,
        Eviction,
        PrefillLayer,
        Selection,
        TowerEdit,
        TowerLayer,
    )


class Stage(str, Enum):
    """Where a method acts; the order is the order in which a visual token passes."""

    TOWER = "tower"
    ENTRY = "entry"
    PREFILL = "prefill"
    CACHE = "cache"


POSITIONS = ("published", "original", "contiguous")


def check_keep(keep: Any, *, name: str = "keep") -> None:
    """Raise ``ValueError`` unless ``keep`` is an int ≥ 1 or a float in (0, 1]."""
    wanted = f"{name} is a number of visual tokens per image (int ≥ 1) or a share of them (float in (0, 1])"
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise ValueError(f"{wanted}, not {keep!r}.")
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"{wanted}; {keep} keeps nothing (the baseline 'no-vision' does that on purpose).")
    if isinstance(keep, float) and not 0.0 < keep <= 1.0:
        raise ValueError(f"{wanted}; {keep} is outside.")


def tokens_to_keep(keep: int | float, n: int) -> int:
    """Budget of one image with ``n`` visual tokens: ``min(keep, n)``, or the rounded share, at least one."""
    return min(keep, n) if isinstance(keep, int) else min(n, max(1, round(keep * n)))


@dataclass(frozen=True)
class Method:
    """Base of every compression method.

    Subclasses are frozen dataclasses whose fields are the paper's hyper-parameters; they set the class variables below,
    override :meth:`validate` and the hook of every stage they name in ``stages``.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    stages: ClassVar[frozenset[Stage]] = frozenset()
    #: reads the prompt, so the choice cannot be cached per image or made by an encoder server
    query_aware: ClassVar[bool] = False
    #: the token count of an image follows from its size alone
    fixed_budget: ClassVar[bool] = True
    #: acts in a tower whose projector joins several patches to one token (only asked of TOWER methods)
    joins_patches: ClassVar[bool] = False
    #: chooses in :meth:`arrival`, by the first decoder layer's attention
    reads_first_layer: ClassVar[bool] = False
    #: makes tokens of what a projector says before the model pools it (``EntryTokens.unpooled``)
    before_pooling: ClassVar[bool] = False
    #: what the paper's released code does with position ids
    published_positions: ClassVar[str] = "contiguous"
    #: the same for cuts inside the language model, where it differs
    published_cut_positions: ClassVar[str] = ""

    def __post_init__(self) -> None:
        owner = self.name or type(self).__name__
        tuples_of_lists(self)
        try:
            self.validate()
        except TypeError:
            check_types(self, owner)  # says in a sentence what a comparison with a wrong type does not
            raise
        check_types(self, owner)

    def validate(self) -> None:
        """Raise ``ValueError`` in one sentence when a hyper-parameter cannot work."""

    def check_family(self, adapter: Adapter) -> None:
        """Raise ``ValueError`` in one sentence when this method cannot serve the model behind ``adapter``."""

    # in front of the tower ---------------------------------------------------------------------------------------
    def asks(self, adapter: Adapter) -> Collection[str]:
        """What, of "image" and "video", :meth:`ask` wants to see before it passes through the tower."""
        return ()

    def ask(self, given: dict[str, Any], ids: LongTensor | None, state: dict, equipment: Any) -> None:
        """Put questions to the model itself, from which everything of this library is off meanwhile.

        ``given``: by name, the arguments of the call that turns the pixels into features; ``ids`` [B, S]: the prompt's
        (None where it came as embeddings); ``equipment``: what :meth:`equip` gave.
        """

    # TOWER ------------------------------------------------------------------------------------------------------
    def resolution(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """Patch grid (rows, columns) to which every view is shrunk before the tower; ``None`` leaves the pixels."""
        return None

    def tower_layers(self, adapter: Adapter) -> Collection[int]:
        """Vision layers (0-based) after which :meth:`tower` is called."""
        return ()

    def tower(self, layer: TowerLayer, state: dict) -> TowerEdit | None:
        """Look at one vision layer's output; optionally shorten it."""
        return None

    # ENTRY ------------------------------------------------------------------------------------------------------
    def entry(self, tokens: EntryTokens, state: dict) -> Selection | None:
        """Choose the visual tokens that enter the language model; ``None`` takes all that the tower left."""
        return None

    def arrival(self, layer: PrefillLayer, state: dict, equipment: Any) -> Cut | None:
        """Choose the visual tokens that enter the language model, with the whole prompt in sight.

        Called in front of the first decoder layer when :attr:`reads_first_layer`; ``layer`` has index -1 and answers
        ``attention(rows, following=True)`` only. ``equipment``: what :meth:`equip` gave.
        """
        return None

    def equip(self, adapter: Adapter) -> Any:
        """What this method needs on one model besides its options (a trained net), read once when it is put on."""
        return None

    # PREFILL ----------------------------------------------------------------------------------------------------
    def cut_layers(self, adapter: Adapter) -> Collection[int]:
        """Decoder layers (0-based) after which :meth:`prefill` is called."""
        return ()

    def watch_layers(self, adapter: Adapter) -> Collection[int]:
        """Decoder layers whose sub-module inputs and outputs :meth:`watch` wants to see during prefill."""
        return ()

    def watch(self, layer: int, part: str, inputs, outputs, state: dict) -> None:
        """See the input and output ``[B, S, D]`` of ``part`` ("attention" or "mlp") of one watched decoder layer."""

    def prefill(self, layer: PrefillLayer, state: dict) -> Cut | None:
        """Choose the visual tokens that go on to the next decoder layer."""
        return None

    # CACHE ------------------------------------------------------------------------------------------------------
    def cache(self, layer: CacheLayer, state: dict) -> Eviction | None:
        """Choose the cache entries of one decoder layer that stay; called after each forward of that layer."""
        return None

    def attend(self, layer: AttendLayer, state: dict) -> LongTensor | None:
        """Say which older cache entries the new tokens see in one decoder layer that is about to run.

        [B, 1, m] sorted entries, the same for all heads; None for all of them. Nothing is evicted by it.
        """
        return None

    def settle(self, layer: CacheLayer, state: dict) -> Eviction | None:
        """Like :meth:`cache`, but called once for every layer when a prompt with images has passed through all of them.

        ``layer.reached`` then tells which entries belong to tokens that no cut took out; attention is not available.
        """
        return None

    def __add__(self, other: Method | Composition) -> Composition:
        return Composition.of(self, other)

    def options(self) -> dict[str, Any]:
        """The hyper-parameters as a JSON-ready dict; ``create(name, **options)`` builds the method again."""
        return dataclasses.asdict(self)


_BEFORE, _CACHE = frozenset({Stage.TOWER, Stage.ENTRY}), frozenset({Stage.CACHE})
#: the hooks of a method, each with the stages of which one must be named for it to be called
HOOKS = {
    "tower": _BEFORE, "entry": _BEFORE, "arrival": _BEFORE, "prefill": frozenset({Stage.PREFILL}), "cache": _CACHE,
    "attend": _CACHE, "settle": _CACHE,
}  # fmt: skip


@dataclass(frozen=True)
class Composition:
    """Methods that act one after the other, at most one before the language model, one inside, one on the cache."""

    methods: tuple[Method, ...]

    @classmethod
    def of(cls, *parts: Method | Composition) -> Composition:
        methods: list[Method] = []
        for part in parts:
            methods += part.methods if isinstance(part, Composition) else [part]
        if strangers := [m for m in methods if not isinstance(m, Method)]:
            raise ValueError(
                f"A composition is made of methods, such as methods()['grid'](keep=64), not of {strangers[0]!r}."
            )
        if not methods:
            raise ValueError("A composition needs at least one method.")
        composed = cls(tuple(methods))
        composed.validate()
        return composed

    def validate(self) -> None:
        before = {Stage.TOWER, Stage.ENTRY}
        for slot, where in ((before, "before the language model"), ({Stage.PREFILL}, "between decoder layers"),
                            ({Stage.CACHE}, "on the cache")):  # fmt: skip
            rivals = [m.name for m in self.methods if m.stages & slot]
            if len(rivals) > 1:
                raise ValueError(
                    f"{' and '.join(rivals)} both choose tokens {where}; compose at most one method for each place."
                )
        for method in self.methods:
            for hook, stages in HOOKS.items():
                # an instance may leave out a stage of its class on purpose
                declared = type(method).stages | method.stages
                if getattr(type(method), hook) is not getattr(Method, hook) and not declared & stages:
                    names = " nor ".join(sorted(f"Stage.{stage.name}" for stage in stages))
                    raise ValueError(
                        f"'{method.name or type(method).__name__}' has a hook '{hook}' that is never called, for its stages "
                        f"do not name {names}."
                    )

    def __add__(self, other: Method | Composition) -> Composition:
        return Composition.of(self, other)

    @property
    def name(self) -> str:
        return "+".join(m.name for m in self.methods)

    def at(self, *stages: Stage) -> list[Method]:
        return [m for m in self.methods if m.stages & set(stages)]


def create(method: str | Method | Composition, **options: Any) -> Composition:
    """Build a composition from a registered name (with its options), an instance, or a composition.

    Options go with a name only. Raises ``ValueError`` for an unknown name or option and for anything that is no method.
    """
    if isinstance(method, (Method, Composition)):
        if options:
            raise ValueError(
                f"Options ({', '.join(options)}) go with a method's name; a method instance already carries its own."
            )
        return Composition.of(method)
    if type(method).__module__.partition(".")[0] == "kvpress":
        raise ValueError(
            f"A press of kvpress ({type(method).__name__}) cannot act here: its hooks need transformers below 5.3, this "
            "library 5.16 or later. Take h2o, a2sf, keyformer, lazyeviction, tokenselect or keep-last."
        )
    if not isinstance(method, str):
        raise ValueError(f"method is a name, a Method or a composition of them, not {type(method).__name__}.")
    from .registry import METHODS

    cls = METHODS.get(method)
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(options) - fields)
    if unknown:
        takes = ", ".join(sorted(fields)) or "no options"
        raise ValueError(f"The method '{method}' has no option {', '.join(map(repr, unknown))}; it takes {takes}.")
    return Composition.of(cls(**options))
