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


class Cycle:
    """How far a step of several models is. Pure.

    A step begins with the forward of a model that does not come after the one that ran last, and
    ends with that of the last model. What shapes the later models will get is guessed from the
    step before: a step whose guess was wrong counts as not completed.
    """

    def __init__(self, num_models: int) -> None:
        self._num_models = num_models
        self._next = 0  # the first model that may go on with the open step
        self._keys: list[Hashable] = []
        self._known: dict[Hashable, tuple[Hashable, ...]] = {}  # by the first model's shapes

    def enter(self, model: int, key: Hashable) -> tuple[Hashable, ...] | None:
        """Begin a model's forward.

        Args:
            model: its number.
            key: of its input shapes.

        Returns:
            The key of the whole step if one begins, None if the open one goes on.
        """
        if 0 < self._next <= model:
            self._keys.append(key)
            return None
        self._keys = [key]
        return self._known.get(key, (key,))

    def leave(self, model: int, completed: bool) -> bool | None:
        """End a model's forward.

        Returns:
            Whether the step is complete and was as guessed; None if it goes on.
        """
        if completed and model + 1 < self._num_models:
            self._next = model + 1
            return None
        self._next = 0
        if not completed:
            return False
        was = tuple(self._keys)
        guessed = self._known.get(was[0], was[:1])
        self._known[was[0]] = was
        return was == guessed

    def interrupt(self) -> None:
        """Forget the open step: something else ran."""
        self._next = 0
