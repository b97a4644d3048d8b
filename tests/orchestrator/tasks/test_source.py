"""Which files a task consists of, their digest, and their import without mixing."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import TaskError
from orchestrator.tasks import source as source_module
from orchestrator.tasks.source import Source, collect, function_source, install, install_function


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


STUDY = {
    "my_task.py": "import json\nimport numpy\nimport helper\nfrom nets.small import size\nVALUE = helper.VALUE + size()\n",
    "helper.py": "VALUE = 1\n",
    "nets/__init__.py": "",
    "nets/small.py": "from . import numbers\nfrom .numbers import TEN\n\ndef size():\n    return numbers.TEN\n",
    "nets/numbers.py": "TEN = 10\n",
    "nets/unused.py": "1 / 0\n",
    "other.py": "1 / 0\n",
}


def test_local_modules_are_found_transitively(tmp_path: Path) -> None:
    source = collect("my_task.py", write(tmp_path, STUDY))
    assert list(source.files) == ["helper.py", "my_task.py", "nets/__init__.py", "nets/numbers.py", "nets/small.py"]
    assert install(source, tmp_path).VALUE == 11


def test_digest_follows_the_helper_and_not_the_folder(tmp_path: Path) -> None:
    first = collect("my_task.py", write(tmp_path / "a", STUDY))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert collect("my_task.py", tmp_path / "b") == first
    write(tmp_path / "b", {"helper.py": "VALUE = 2\n"})
    assert collect("my_task.py", tmp_path / "b").digest != first.digest
    write(tmp_path / "a", {"other.py": "changed = True\n"})
    assert collect("my_task.py", tmp_path / "a") == first


def test_line_endings_do_not_count(tmp_path: Path) -> None:
    first = collect("my_task.py", write(tmp_path, STUDY))
    (tmp_path / "helper.py").write_bytes(b"VALUE = 1\r\n")
    assert collect("my_task.py", tmp_path).digest == first.digest


@given(texts=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(0, 3), min_size=1))
def test_equal_digests_mean_equal_files(texts: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("study")
    write(folder, {f"{name}.py": f"N = {number}\n" for name, number in texts.items()})
    write(folder, {"my_task.py": "".join(f"import {name}\n" for name in texts)})
    source = collect("my_task.py", folder)
    assert set(source.files) == {"my_task.py", *(f"{name}.py" for name in texts)}
    write(folder, {f"{min(texts)}.py": "N = 4\n"})
    assert collect("my_task.py", folder).digest != source.digest


def test_two_versions_do_not_mix_even_when_imports_come_late(tmp_path: Path) -> None:
    late = {"my_task.py": "def value():\n    import helper\n    return helper.VALUE\n", "helper.py": "VALUE = 1\n"}
    first = install(collect("my_task.py", write(tmp_path, late)), tmp_path)
    # Same length, same second: a cached .pyc would be taken for fresh.
    second = install(collect("my_task.py", write(tmp_path, {"helper.py": "VALUE = 2\n"})), tmp_path)
    assert (first.value(), second.value(), first.value()) == (1, 2, 1)
    assert "helper" not in sys.modules
    assert "my_task" not in sys.modules


def test_the_same_texts_are_imported_once(tmp_path: Path) -> None:
    write(tmp_path, STUDY)
    assert install(collect("my_task.py", tmp_path), tmp_path) is install(collect("my_task.py", tmp_path), tmp_path)


def test_modules_read_data_beside_their_own_file(tmp_path: Path) -> None:
    text = "from pathlib import Path\nVALUE = (Path(__file__).parent / 'data.txt').read_text()\n"
    for folder in ("a", "b"):
        write(tmp_path / folder, {"my_task.py": text, "data.txt": folder})
    a, b = (install(collect("my_task.py", tmp_path / folder), tmp_path / folder) for folder in ("a", "b"))
    assert (a.VALUE, b.VALUE) == ("a", "b")


def test_a_worker_without_the_files_imports_from_the_source(tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(collect("my_task.py", write(tmp_path / "here", STUDY))))
    shutil.rmtree(tmp_path / "here")
    for root in (tmp_path / "here", None):
        module = install(source, root)
        assert module.VALUE == 11
        assert Path(str(module.__file__)).read_text() == source.files["my_task.py"]


def test_what_killed_workers_left_is_swept_and_what_is_in_use_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, used, young = (tmp_path / f"orchardist-task-{name}" for name in ("left", "used", "young"))
    for folder in (left, used, young):
        folder.mkdir()
        (folder / "task.py").write_text("x = 1")
    for folder in (left, used):
        os.utime(folder, (0, 0))
    lock = os.open(used, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    (tmp_path / "orchardist-task-link").symlink_to(tmp_path)
    try:
        mine = source_module._materialise(Source(name="t.py", module="t", files={"t.py": "y = 1"}, digest="d"))
        os.utime(mine, (0, 0))
        source_module._sweep_materialised(tmp_path)
        assert not left.exists() and used.exists() and young.exists() and (mine / "t.py").exists()
    finally:
        os.close(lock)


def test_a_worker_with_other_files_does_not_use_them(tmp_path: Path) -> None:
    source = collect("my_task.py", write(tmp_path, STUDY))
    write(tmp_path, {"helper.py": "VALUE = 100\n"})
    assert install(source, tmp_path).VALUE == 11


@pytest.mark.parametrize(
    "text",
    [
        "import helper\nV = helper.VALUE",
        "import helper as h\nV = h.VALUE",
        "from helper import VALUE as V",
        "from . import helper\nV = helper.VALUE",
        "from .helper import VALUE as V",
        "import pack.deep\nV = pack.deep.VALUE",
        "import pack.deep as d\nV = d.VALUE",
        "from pack import deep\nV = deep.VALUE",
        "from pack.deep import *\nV = VALUE",
        "import bare.deep\nV = bare.deep.VALUE",
        "from bare import deep\nV = deep.VALUE",
        "from .bare import deep\nV = deep.VALUE",
    ],
)
@pytest.mark.parametrize("place", ["", "tasks/", "v1.2/"])
def test_every_form_of_import(tmp_path: Path, text: str, place: str) -> None:
    files = {
        "my_task.py": text + "\n",
        "helper.py": "VALUE = 7\n",
        "pack/__init__.py": "",
        "pack/deep.py": "VALUE = 7\n",
    }
    files["bare/deep.py"] = "VALUE = 7\n"
    write(tmp_path, {place + name: content for name, content in files.items()})
    source = collect(f"{place}my_task.py", tmp_path)
    assert install(source, tmp_path).V == 7
    assert install(source).V == 7


def test_a_task_in_a_subfolder_sees_its_own_folder_first_then_the_studys(tmp_path: Path) -> None:
    write(tmp_path, {"helper.py": "V = 'study'\n", "shared.py": "V = 'shared'\n", "tasks/helper.py": "V = 'own'\n"})
    write(tmp_path, {"tasks/my_task.py": "import helper, shared\nV = (helper.V, shared.V)\n"})
    source = collect("tasks/my_task.py", tmp_path)
    assert list(source.files) == ["shared.py", "tasks/helper.py", "tasks/my_task.py"]
    assert install(source, tmp_path).V == ("own", "shared")


def test_a_task_outside_the_studys_folder(tmp_path: Path) -> None:
    write(
        tmp_path, {"shared/my_task.py": "import helper\nV = helper.V\n", "shared/helper.py": "V = 3\n", "study/x": ""}
    )
    source = collect("../shared/my_task.py", tmp_path / "study")
    assert list(source.files) == ["helper.py", "my_task.py"]
    assert install(source, tmp_path / "study").V == 3


def test_modules_by_dotted_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path, {"lab/__init__.py": "", "lab/job.py": "from lab import util\nV = util.V\n", "lab/util.py": "V = 5\n"}
    )
    source = collect("lab.job", tmp_path)
    assert list(source.files) == ["lab/__init__.py", "lab/job.py", "lab/util.py"]
    assert install(source, tmp_path).V == 5
    monkeypatch.syspath_prepend(tmp_path)
    assert collect("lab.job", tmp_path / "elsewhere") == source


def test_installed_packages_and_data_folders_of_the_same_name_are_not_local(tmp_path: Path) -> None:
    write(tmp_path, {"my_task.py": "from json import dumps\nimport torch\nV = dumps(1)\n", "json/data.txt": ""})
    write(tmp_path, {"torch/notes.txt": ""})
    source = collect("my_task.py", tmp_path)
    assert list(source.files) == ["my_task.py"]
    assert install(source, tmp_path).V == "1"


def test_our_own_packages_are_not_the_users_even_beside_the_study() -> None:
    root = Path(__file__).parents[3]
    source = collect("tests/orchestrator/tasks/test_source.py", root)
    assert not any(path.startswith(("orchestrator/", "search/")) for path in source.files)


def test_circular_imports(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "import b\nA = 1\ndef both():\n    return A + b.B\n", "b.py": "import a\nB = 2\n"})
    assert install(collect("a.py", tmp_path), tmp_path).both() == 3
    assert collect("a.py", tmp_path).digest != collect("b.py", tmp_path).digest


def test_builtin_source_holds_its_module_and_the_models() -> None:
    source = collect("mnist", Path())
    assert {"orchestrator/tasks/mnist.py", "orchestrator/tasks/models.py"} <= set(source.files)
    assert source.builtin
    assert install(source).__name__ == "orchestrator.tasks.mnist"


def test_functions(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"mine.py": "from helper import V\ndef score(weight):\n    return V * weight\n", "helper.py": "V = 2\n"},
    )
    for name in ("mine:score", "mine.py:score"):
        source = function_source(name, tmp_path)
        assert list(source.files) == ["helper.py", "mine.py"]
        assert install_function(source, tmp_path)(3) == 6
    with pytest.raises(TaskError, match="^function 'mine:scor': 'mine' has no function 'scor'$"):
        install_function(function_source("mine:scor", tmp_path), tmp_path)
    with pytest.raises(TaskError, match="does not name a function"):
        function_source("mine", tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nraise ValueError('first\\nsecond')\n", "mine.py:2: ValueError: first"),
        ("import nowhere_at_all\n", "mine.py:1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("import sys\nsys.exit(3)\n", "mine.py:2: SystemExit: 3"),
        ("import helper\n", "helper.py:1: ZeroDivisionError: division by zero"),
    ],
)
def test_functions_whose_module_cannot_be_imported(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, {"mine.py": text, "helper.py": "V = 1 / 0\n"})
    with pytest.raises(TaskError) as caught:
        install_function(function_source("mine:score", tmp_path), tmp_path)
    assert str(caught.value) == f"function 'mine:score' failed in {said}"


def test_what_cannot_be_collected(tmp_path: Path) -> None:
    write(tmp_path, {"bad.py": "import helper\n", "helper.py": "x = 1\ndef f(:\n"})
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    for name, said in (
        ("nowhere.py", f"task 'nowhere.py': there is no file {tmp_path.resolve()}/nowhere.py"),
        ("bad.py", r"helper.py:2: .*: def f\(:"),
        (
            "mnits",
            "task 'mnits': no module of that name in .*; did you mean 'mnist'.* Built in: digits, mnist, mnist-pretrained, mnist1d; ",
        ),
        ("binary.py", "binary.py cannot be read: "),
    ):
        with pytest.raises(TaskError, match=f"^{said}") as caught:
            collect(name, tmp_path)
        assert "\n" not in str(caught.value)
