"""Registries of networks and initializations, which users may add to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A registered builder and what the rest of the package must know of it.

    Attributes:
        builder (`Callable`): Called with the config first; see the `register_*` functions for the rest.
        per_token (`bool`): Whether `encoder_shared=False` (one network per virtual token) makes sense for it.
        unused_fields (`tuple[str, ...]`): Config fields that it does not read; setting one of them warns.
        mixes_vocabulary (`bool`): Whether the prompt embedding holds weights for frozen rows of the vocabulary.
        samples_vocabulary (`bool`): Whether an initialization takes `exclude_ids`.
    """

    builder: Callable[..., Any]
    per_token: bool = False
    unused_fields: tuple[str, ...] = ()
    mixes_vocabulary: bool = False
    samples_vocabulary: bool = False


class Registry:
    """Maps the values of one config field to builders.

    Args:
        field (`str`): The config field whose values are the names, for error messages.
        register_name (`str`): The public function that adds a name, for error messages.
    """

    def __init__(self, field: str, register_name: str) -> None:
        self.field = field
        self.register_name = register_name
        self._entries: dict[str, Entry] = {}

    def names(self) -> list[str]:
        """All registered names, in order of registration."""
        return list(self._entries)

    def add(self, name: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that registers a builder as `name`. A name belongs to one builder only.

        Raises:
            ValueError: If `name` is not a non-empty string, or is taken by another builder.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name` must be a non-empty string, got {name!r}.")

        def decorate(builder: Callable[..., Any]) -> Callable[..., Any]:
            taken = self._entries.get(name)
            # The same definition, executed again (a notebook cell, a module reload), replaces itself.
            if taken is not None and _origin(taken.builder) != _origin(builder):
                raise ValueError(
                    f"{self.field}={name!r} is already registered by {'.'.join(_origin(taken.builder))}. "
                    "Choose another name."
                )
            self._entries[name] = Entry(builder, **options)
            return builder

        return decorate

    def __getitem__(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise ValueError(
                f"Unknown {self.field}={name!r}. Known: {', '.join(map(repr, self.names()))}. To use a custom one, "
                f"first import the module that registers it with `peft_residual.{self.register_name}`."
            ) from None


def _origin(builder: Callable[..., Any]) -> tuple[str, str]:
    return getattr(builder, "__module__", "?"), getattr(builder, "__qualname__", repr(builder))


REPARAMETERIZATIONS = Registry("encoder_reparameterization_type", "register_reparameterization")
INITIALIZATIONS = Registry("prompt_tuning_init", "register_initialization")
