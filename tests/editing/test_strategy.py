"""The class of an editor is checked before an editor is made, and a text edit before it reaches the editor."""

from collections.abc import Callable
from typing import Any

import pytest

from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS

MakeModel = Callable[..., EditableModel]

TASKS = "classification, qa, completion, language_modelling"


class Scaled(EditorStrategy):
    """Does nothing, at a rate."""

    def __init__(self, *, model: Any, lr: float = 0.1, plugins: Any = (), evaluator: Any = None) -> None:
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        self.lr = lr

    def edit(self, batch: EditBatch) -> EditOutcome:
        return EditOutcome()


class AnyOptions(Scaled):
    """Takes whatever it is given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)


class Renamed(Scaled):
    """Stores its rank under another name."""

    def __init__(self, *, model: Any, rank: int = 4, plugins: Any = (), evaluator: Any = None) -> None:
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        self.r = rank


class Positional(Scaled):
    """Takes its rate by position."""

    def __init__(self, model: Any, lr: float = 0.1, plugins: Any = (), evaluator: Any = None) -> None:
        super().__init__(model=model, lr=lr, plugins=plugins, evaluator=evaluator)


class NoPlugins(Scaled):
    """Cannot be given plugins or metrics."""

    def __init__(self, *, model: Any, lr: float = 0.1) -> None:
        super().__init__(model=model, lr=lr)


class NoEdit(EditorStrategy):
    """Has no `edit`."""


def having(**attributes: Any) -> type[EditorStrategy]:
    return type("Changed", (Scaled,), {"__doc__": "The editor with other class attributes.", **attributes})


def test_an_editor_whose_options_are_stored_by_itself_or_its_base_is_fine() -> None:
    assert Scaled.check_class() is None
    assert having(needs_subject=True, supported_tasks=("qa",)).check_class() is None


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (
            AnyOptions,
            "AnyOptions.__init__ takes **options: name every argument, each becomes an option with its default",
        ),
        (Renamed, "Renamed.__init__ does not keep its argument 'rank': set `self.rank = rank`"),
        (Positional, "Positional.__init__ takes lr by position: put `*` in front to make it keyword-only"),
        (NoPlugins, "NoPlugins.__init__ lacks plugins, evaluator: take them and pass them on to super().__init__"),
        (NoEdit, "NoEdit is abstract: implement edit"),
        (
            having(__doc__=None),
            "Changed has no docstring: write one, its first line describes the class in listings",
        ),
        (having(needs_subject="yes"), "needs_subject of Changed is 'yes': set it to True or False"),
        (having(freezes_weights=None), "freezes_weights of Changed is None: set it to True or False"),
        (having(supported_tasks="qa"), "supported_tasks of Changed is 'qa': set it to a tuple, such as ('qa',)"),
        (having(supported_tasks=()), "supported_tasks of Changed is (): set it to a tuple, such as ('qa',)"),
        (
            having(supported_tasks=("qa", "clasification")),
            f"a supported task of Changed is 'clasification'; did you mean 'classification'? (there are: {TASKS})",
        ),
    ],
)
def test_what_is_wrong_with_an_editor_is_one_line_with_the_remedy(cls: type[EditorStrategy], says: str) -> None:
    assert cls.check_class() == says


@pytest.mark.parametrize("target", ["Euro", 4, -1])
def test_a_target_that_is_none_of_the_labels_is_the_users_mistake(target: str | int, make_model: MakeModel) -> None:
    model = make_model("classification")
    with EDITORS.get("grace")(model=model) as editor:
        with pytest.raises(UserError, match=r"label .*0 to 3") as caught:
            editor.edit_text("what is the currency of Italy", target)
        assert "\n" not in str(caught.value)
        assert editor.n_edits == 0
