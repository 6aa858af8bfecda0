"""Users' Python files: what is loaded, under which names, and what is never executed."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from dcjax.data.arithmetic import ArithmeticTask
from dcjax.user_code import CodeFile, code_files_in, file_of, find, is_installed, reference_to

SOURCE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Section:
    limit: float = 0.5

    class Inner:
        pass

def score(text):
    return len(text)
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    return CodeFile.read(tmp_path / "mine.py")


def test_equal_sources_are_one_module_wherever_they_lie(recipe, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "recipe.py").write_text(SOURCE)
    copy = CodeFile.read(tmp_path / "copy" / "recipe.py")
    assert recipe.load() is copy.load()
    assert recipe.load().Section() == copy.load().Section()
    (tmp_path / "mine.py").write_text(SOURCE + "\n# changed\n")
    changed = CodeFile.read(tmp_path / "mine.py")
    assert changed.load() is not recipe.load() and changed.sha256 != recipe.sha256


def test_a_file_may_be_called_like_any_module(tmp_path):
    for name in ("math", "random", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"import math, random, numpy\nnumber = {len(name)}\n")
        assert CodeFile.read(tmp_path / f"{name}.py").load().number == len(name)
        # a module may be built into Python, and has no file then
        assert Path(getattr(sys.modules[name], "__file__", None) or "").parent != tmp_path


def test_a_file_that_raises_is_not_kept(tmp_path):
    (tmp_path / "bad.py").write_text("raise KeyError('mine')\n")
    bad = CodeFile.read(tmp_path / "bad.py")
    for _ in range(2):
        with pytest.raises(KeyError):
            bad.load()
    assert bad.module_name not in sys.modules


def test_what_is_defined_is_referred_to_by_module_and_name(recipe):
    assert reference_to(ArithmeticTask) == "dcjax.data.arithmetic:ArithmeticTask"
    assert reference_to(recipe.load().Section.Inner) == "recipe:Section.Inner"
    for name in ("dcjax.data.arithmetic:ArithmeticTask", "numpy:ndarray", "recipe:Section.Inner", "recipe:score"):
        assert reference_to(find(name, recipe)) == name


def test_what_a_function_defines_has_no_name_to_refer_to():
    class Local:
        pass

    with pytest.raises(ValueError, match=r"Local must be defined at the top level of its file"):
        reference_to(Local)


@pytest.mark.parametrize(
    "reference",
    ["os:system", "subprocess:Popen", "sys:modules", "builtins:eval", "my_module:f", "posixpath:os.system"],
)
def test_the_standard_library_and_what_lies_about_is_not_imported(reference, tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text("raise AssertionError('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="is neither in dcjax, nor in the recipe, nor in an installed package"):
        find(reference, None)


@pytest.mark.parametrize(
    "reference", ["", "dcjax", ":", "dcjax:", "a b:c", "recipe:f()", "dcjax.__main__;x:y", None, 3]
)
def test_what_is_no_reference_is_quoted(reference, recipe):
    with pytest.raises(ValueError, match="is not MODULE:NAME") as caught:
        find(reference, recipe)
    assert repr(reference) in str(caught.value)


def test_a_name_that_is_not_there_is_quoted_with_the_reason(recipe):
    with pytest.raises(ValueError, match=r"'recipe:Other' cannot be imported: AttributeError: .*'Other'"):
        find("recipe:Other", recipe)
    with pytest.raises(ValueError, match="'recipe:Section' is in a recipe, and there is none"):
        find("recipe:Section", None)


def test_installed_packages_are_known_without_being_imported():
    code = "import sys; from dcjax.user_code import is_installed; assert is_installed('scipy.stats'); "
    code += "sys.exit('scipy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert is_installed("dcjax.anything") and is_installed("numpy") and not is_installed("os")


def test_a_module_outside_every_package_is_the_file_that_it_came_from(recipe):
    found = file_of(recipe.load().__name__)
    assert found is not None and found.sha256 == recipe.sha256
    assert file_of("numpy.linalg") is None
    here = file_of(__name__)
    assert here is not None and here.path == Path(__file__)


def test_another_process_is_told_which_files_to_load(recipe):
    pickled = pickle.dumps(recipe.load().score)
    assert [file.sha256 for file in code_files_in(pickled)] == [recipe.sha256]
    assert code_files_in(pickle.dumps(len)) == []
    code = "import pickle, sys; files, pickled = pickle.load(sys.stdin.buffer); [file.load() for file in files]; "
    code += "sys.exit(pickle.loads(pickled)('four') + 3)"
    sent = pickle.dumps((code_files_in(pickled), pickled))
    assert subprocess.run([sys.executable, "-c", code], input=sent).returncode == 7
