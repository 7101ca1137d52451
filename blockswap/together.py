"""Models that run one after the other in each step: streamed as one, in one cycle."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import nn


class Together(nn.Module):
    """Holds the models as its children, under their class names; the models do not know of it."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        for model in models:
            name = kind = type(model).__name__
            number = 1
            while name in self._modules:
                number += 1
                name = f"{kind}_{number}"
            self.add_module(name, model)


def members_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the models that a session streams, by the prefix of their modules' names."""
    if isinstance(model, Together):
        return {f"{name}.": part for name, part in model.named_children()}
    return {"": model}


def name_of(model: nn.Module) -> str:
    """Return a model's class; of several, all of them."""
    return " + ".join(type(part).__name__ for part in members_of(model).values())


# Which model ran, and what makes its input need other memory and time.
Part = tuple[int, Hashable]


class Cycle:
    """How far a step of several models is. Pure.

    A step begins with the forward of a model that does not come after the one that ran last, and
    ends with that of the last model. What the later models will get is guessed from the last whole
    step that began alike. Where a forward is not the one that was guessed, a step of its own
    begins. Only a whole step that was guessed right counts as completed.
    """

    def __init__(self, num_models: int) -> None:
        self._num_models = num_models
        self._next = 0  # the first model that may go on with the open step
        self._parts: list[Part] = []
        self._known: dict[Part, tuple[Part, ...]] = {}  # whole steps by their first part

    def enter(self, model: int, key: Hashable) -> tuple[Part, ...] | None:
        """Begin a model's forward.

        Args:
            model: its number.
            key: of its input shapes.

        Returns:
            The key of the whole step if one begins, None if the open one goes on.
        """
        part = (model, key)
        if not 0 < self._next <= model:
            self._parts = [part]
            return self._known.get(part, (part,))
        self._parts.append(part)
        guessed = self._known.get(self._parts[0])
        if guessed is None or guessed[: len(self._parts)] == tuple(self._parts):
            return None
        return tuple(self._parts)

    def leave(self, model: int, completed: bool) -> bool | None:
        """End a model's forward.

        Returns:
            Whether the step is whole and was as guessed; None if it goes on.
        """
        if completed and model + 1 < self._num_models:
            self._next = model + 1
            return None
        self._next = 0
        was = tuple(self._parts)
        if not completed or [number for number, _ in was] != list(range(self._num_models)):
            return False
        guessed = self._known.get(was[0], was[:1])
        self._known[was[0]] = was
        return was == guessed

    def interrupt(self) -> None:
        """Forget the open step: something else ran."""
        self._next = 0
