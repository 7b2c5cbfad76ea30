"""The tree of exceptions, as its docstring draws it."""

from __future__ import annotations

import pickle
import re

import pytest

from headway import errors
from headway.errors import FieldError, HeadwayError, Interrupted, MissingExtraError

kinds = [getattr(errors, name) for name in errors.__all__]


def drawn() -> dict[str, tuple[str, int | None]]:
    """Name → (parent, exit code if one is drawn), read from the tree in the docstring of `headway.errors`."""
    tree: dict[str, tuple[str, int | None]] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│ ├└─]*)([A-Z]\w+)\s*(\d+)?", line)
        if match is None:
            continue
        depth = len(match[1])
        above = [(column, name) for column, name in above if column < depth]
        tree[match[2]] = (above[-1][1] if above else "", int(match[3]) if match[3] else None)
        above.append((depth, match[2]))
    return tree


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes():
    tree = drawn()
    assert set(tree) == set(errors.__all__)
    for name, (parent, exit_code) in tree.items():
        kind = getattr(errors, name)
        if parent:
            assert kind.__base__.__name__ == parent
        if exit_code is not None:
            assert kind.exit_code == exit_code


@pytest.mark.parametrize("kind", kinds)
def test_an_error_crosses_process_boundaries_whole(kind):
    again = pickle.loads(pickle.dumps(kind("broken", place="here", remedy="mend it")))
    assert type(again) is kind
    assert (again.message, again.place, again.remedy) == ("broken", "here", "mend it")
    assert str(again) == "here: broken\n  hint: mend it"


def test_an_error_prints_only_what_it_has():
    assert str(HeadwayError("broken")) == "broken"
    assert str(FieldError("broken", place="plan.json: data")) == "plan.json: data: broken"


def test_a_missing_extra_names_the_library_and_how_to_install_it():
    error = MissingExtraError(library="ray", extra="ray")
    assert "ray is not installed" in str(error)
    assert "pip install 'headway[ray]'" in str(error)


def test_exit_codes_tell_kinds_of_failure_apart():
    assert FieldError("").exit_code == 2
    assert errors.DoesNotFitError("").exit_code == 3
    assert errors.RankFailedError("").exit_code == 4
    assert Interrupted("").exit_code == 130
