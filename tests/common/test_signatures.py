"""What is wrong with a class is found without making one of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import pytest

from grace_bench.common.signatures import class_fault, constructor_fault, required_argument


class Base(ABC):
    """What the classes of a kind are derived from."""

    size: int = 16

    def __init__(self, *, model: Any = None) -> None:
        self.model = model

    @abstractmethod
    def work(self) -> None: ...


class KeptByBase(Base):
    """Stores what classes below it hand up."""

    def __init__(self, *, model: Any, lr: float) -> None:
        super().__init__(model=model)
        self.lr = lr


class Kept(KeptByBase):
    """Stores one argument itself, hands another up, and has a third as a property."""

    def __init__(self, *, model: Any, lr: float = 0.1, steps: int = 3, scale: float = 1.0) -> None:
        super().__init__(model=model, lr=lr)
        self.steps, self._scale = steps, scale

    @property
    def scale(self) -> float:
        return self._scale


@dataclass(kw_only=True)
class Fields:
    """A dataclass, whose generated constructor stores its fields."""

    path: str
    limit: int = 3


class Positional(Base):
    """Takes an option by position."""

    def __init__(self, model: Any, lr: float = 0.1) -> None:
        super().__init__(model=model)
        self.lr = lr


class Renamed(Base):
    """Stores an argument under another name."""

    def __init__(self, *, model: Any, lr: float = 0.1) -> None:
        super().__init__(model=model)
        self.learning_rate = lr


class Shadowed(Base):
    """Forgets an argument that the base has a default for, under the same name."""

    def __init__(self, *, model: Any, size: int = 8) -> None:
        super().__init__(model=model)


class Method(Base):
    """Forgets an argument that has the name of a method."""

    def __init__(self, *, model: Any, work: int = 8) -> None:
        super().__init__(model=model)

    def work(self) -> None: ...


class AnyOptions(Base):
    """Takes whatever it is given."""

    def __init__(self, *, model: Any, **options: Any) -> None:
        super().__init__(model=model)


class AnyValues(Base):
    """Takes as many as it is given."""

    def __init__(self, *values: int, model: Any) -> None:
        super().__init__(model=model)


class Loose:
    """Takes anything."""

    def __init__(self, *values: int, **options: int) -> None: ...


class NoModel(Base):
    """Does not take the model."""

    def __init__(self, *, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr


def wrapped(init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def call(*args: Any, **kwargs: Any) -> None:
        init(*args, **kwargs)

    return call


class Wrapped(Kept):
    """Has its constructor wrapped, as Avalanche does."""

    __init__ = wrapped(Kept.__init__)  # type: ignore[assignment]


@pytest.mark.parametrize("cls", [KeptByBase, Kept, Wrapped])
def test_an_argument_may_be_stored_by_a_base_class_or_be_a_property(cls: type) -> None:
    assert constructor_fault(cls, base=Base, given=("model",)) is None


def test_the_generated_constructor_of_a_dataclass_stores_its_fields() -> None:
    assert constructor_fault(Fields, base=object) is None


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (Positional, "Positional.__init__ takes lr by position: put `*` in front to make it keyword-only"),
        (Renamed, "Renamed.__init__ does not keep its argument 'lr': set `self.lr = lr`"),
        (Shadowed, "Shadowed.__init__ does not keep its argument 'size': set `self.size = size`"),
        (Method, "Method.__init__ does not keep its argument 'work': set `self.work = work`"),
        (
            AnyOptions,
            "AnyOptions.__init__ takes **options: name every argument, each becomes an option with its default",
        ),
        (AnyValues, "AnyValues.__init__ takes *values: name every argument, each becomes an option with its default"),
        (NoModel, "NoModel.__init__ lacks model: take them and pass them on to super().__init__"),
    ],
)
def test_a_fault_of_a_constructor_names_the_argument_and_the_remedy(cls: type, says: str) -> None:
    assert constructor_fault(cls, base=Base, given=("model",)) == says


def test_a_class_needs_a_docstring_of_its_own_and_all_abstract_methods() -> None:
    class Undocumented(Method):
        pass

    assert class_fault(Method) is None
    assert class_fault(Kept) == "Kept is abstract: implement work"
    assert class_fault(Undocumented) == (
        "Undocumented has no docstring: write one, its first line describes the class in listings"
    )


def test_an_argument_without_a_default_is_required_and_any_number_of_them_is_not() -> None:
    assert required_argument(Fields) == "path"
    assert required_argument(Positional) == "model"
    assert required_argument(NoModel) is None
    assert required_argument(Loose) is None
