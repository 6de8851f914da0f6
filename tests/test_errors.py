"""Errors keep their type, their words and their parts on the way to a user, and every one that is raised has all."""

from __future__ import annotations

import ast
import pickle
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

import crosskd_assign
from crosskd_assign import errors
from crosskd_assign.errors import CrossKDError, TargetError
from tests.makers.pages import leads_somewhere

PARTS = {"expected": "a cat", "got": "a dog", "where": "house", "fix": "buy a cat"}
SENTENCE = "Expected a cat, but got a dog (house). Fix: buy a cat."
ROOT = Path(crosskd_assign.__file__).parent
WHOLE_MESSAGES = {"report.py"}  # lists every problem of an adapter, each with its own fix


def parts(error: CrossKDError) -> dict[str, str]:
    return {name: getattr(error, name) for name in PARTS}


# --- what an error holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_is_its_sentence_and_its_four_parts(name):
    error = getattr(errors, name)(**PARTS)
    assert (str(error), error.args, parts(error)) == (SENTENCE, (SENTENCE,), PARTS)
    assert repr(error) == f"{name}({SENTENCE!r})"


@pytest.mark.parametrize("name", errors.__all__)
def test_a_traceback_ends_with_the_section_that_explains_this_error(name):
    kind = getattr(errors, name)
    assert leads_somewhere(kind.page)
    assert kind.page.partition("#")[2] == ("" if kind is CrossKDError else name.lower())  # no other's section
    shown = "".join(traceback.format_exception_only(kind(**PARTS)))
    start = f"crosskd_assign.errors.{name}: {SENTENCE}\n"
    # Python 3.10 shows notes only where the package exceptiongroup, which test tools bring, is imported.
    assert shown == f"{start}See {kind.page}.\n" or (sys.version_info < (3, 11) and shown == start)


def test_a_message_alone_stands_for_the_parts():
    error = TargetError("anything")
    assert str(error) == "anything"
    assert set(parts(error).values()) == {""}


def test_the_parts_are_named_and_never_given_by_place():
    with pytest.raises(TypeError):
        TargetError("a cat", "a dog", "house", "buy a cat")  # type: ignore[misc]


# --- the way through other processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", errors.__all__)
def test_pickles_keep_type_sentence_parts_and_notes(name, protocol):
    error = getattr(errors, name)(**PARTS)
    error.file = "a.json"  # what somebody attached
    twin = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301
    assert type(twin) is type(error)
    assert (str(twin), parts(twin), twin.page, twin.file) == (SENTENCE, PARTS, error.page, "a.json")
    assert twin.__notes__ == error.__notes__


def fail() -> None:
    raise TargetError(**PARTS)


def test_another_process_raises_it_here_with_all_parts():
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(TargetError) as caught,
    ):
        pool.submit(fail).result(timeout=120)
    assert (str(caught.value), parts(caught.value)) == (SENTENCE, PARTS)


class Failing(Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> Any:
        raise TargetError(**PARTS)


def test_a_loaders_worker_raises_it_here_with_its_type_and_words():
    with pytest.raises(TargetError) as caught:
        next(iter(DataLoader(Failing(), num_workers=1, multiprocessing_context="spawn", timeout=120)))
    # torch raises it again as type(message), a traceback around our sentence.
    assert SENTENCE in str(caught.value)
    assert caught.value.page == TargetError.page


# --- what is raised ---------------------------------------------------------------------------------------------------


def own(node: ast.AST | None, classes: set[str]) -> bool:
    """Whether a node is the call of one of our errors, or of a variable that holds one."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_error_is_made_of_the_four_parts(path):
    classes = {*errors.__all__, "error"}  # "error" is the type that a helper is given
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if own(node, classes):
            assert isinstance(node, ast.Call)
            assert not node.args or path.name in WHOLE_MESSAGES, f"{path.name}:{node.lineno} is a sentence by hand"
            assert node.args or {x.arg for x in node.keywords} == set(PARTS), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("name", errors.__all__)
def test_every_kind_of_error_is_raised_by_something_or_is_a_root(name):
    kind = getattr(errors, name)
    source = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py") if path.name != "errors.py")
    assert f"{name}(" in source or kind.__subclasses__(), f"nothing raises {name}"
