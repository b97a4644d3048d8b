from __future__ import annotations

from pathlib import Path

import pytest

import orchestrator
from orchestrator.errors import InputError
from orchestrator.jobs.shipping import FOLDER, shipment
from orchestrator.tasks.source import collect
from tests.orchestrator.pools import small

STUDY = 'name = "small"\ntask = "{task}"\n{more}[train]\nepochs = 1\n'
ROOT = Path(orchestrator.__file__).resolve().parents[1]


def study(folder: Path, task: str = "my_task.py", more: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.toml"
    path.write_text(STUDY.format(task=task, more=more))
    return path


def yours(path: Path, *include: Path) -> set[str]:
    return {name.removeprefix(f"{FOLDER}/") for name in shipment(path, include).yours}


def test_the_task_and_the_modules_it_imports_travel_and_nothing_else(weird_tmp_path: Path) -> None:
    path = study(weird_tmp_path)
    small.write_task(weird_tmp_path)
    for name in (".env", "notes.txt", "other.py", "big.csv"):
        (weird_tmp_path / name).write_text("SECRET = 1\n")
    assert yours(path) == {"study.toml", "my_task.py", "blobs.py"}


def test_orchardist_travels_as_its_wheel_has_it(tmp_path: Path) -> None:
    house = shipment(study(tmp_path, "digits")).house
    on_disk = {
        path.relative_to(ROOT).as_posix() for top in ("orchestrator", "search") for path in (ROOT / top).rglob("*.py")
    }
    assert on_disk <= set(house)
    assert not [name for name in house if name.endswith(".pyc") or "/." in name]


def test_what_arrives_is_the_task_that_was_sent(tmp_path: Path) -> None:
    path = study(tmp_path / "here")
    small.write_task(path.parent)
    sent = shipment(path)
    sent.write(tmp_path / "there")
    there = tmp_path / "there" / sent.study
    assert there.read_text() == path.read_text()
    assert collect("my_task.py", there.parent).digest == collect("my_task.py", path.parent).digest


def test_a_task_beside_the_study_s_folder_is_found_again(tmp_path: Path) -> None:
    path = study(tmp_path / "here" / "studies", "../lib/my_task.py")
    (tmp_path / "here" / "lib").mkdir()
    small.write_task(tmp_path / "here" / "lib")
    sent = shipment(path)
    assert set(sent.yours) == {f"{FOLDER}/{name}" for name in ("studies/study.toml", "lib/my_task.py", "lib/blobs.py")}
    sent.write(tmp_path / "there")
    collect("../lib/my_task.py", (tmp_path / "there" / sent.study).parent)


def test_a_module_keeps_its_own_encoding(tmp_path: Path) -> None:
    path = study(tmp_path)
    (tmp_path / "my_task.py").write_bytes("# coding: latin-1\nNAME = 'é'\n".encode("latin-1"))
    sent = shipment(path)
    assert sent.yours[f"{FOLDER}/my_task.py"] == (tmp_path / "my_task.py").read_bytes()


def test_a_checkpoint_travels(tmp_path: Path) -> None:
    path = study(tmp_path, "digits", 'checkpoint = "weights.safetensors"\n')
    (tmp_path / "weights.safetensors").write_bytes(b"1234")
    assert yours(path) == {"study.toml", "weights.safetensors"}


def test_what_has_an_absolute_path_stays_and_is_named(tmp_path: Path) -> None:
    sent = shipment(study(tmp_path, "/shared/my_task.py"))
    assert sent.left == ("/shared/my_task.py",)
    assert set(sent.yours) == {f"{FOLDER}/study.toml"}


def test_included_folders_travel_without_what_is_hidden(tmp_path: Path) -> None:
    path = study(tmp_path, "digits")
    for name in ("data/a.csv", "data/.env", "data/.git/config", "data/__pycache__/x.pyc", "data/deep/b.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    (tmp_path / "data" / "link").symlink_to("/etc/hostname")
    (tmp_path / "data" / "env_link.txt").symlink_to(".env")
    (tmp_path / "data" / "config.txt").symlink_to(".git/config")
    assert yours(path, tmp_path / "data") == {"study.toml", "data/a.csv", "data/deep/b.csv"}


SECRETS = [
    *("credentials.json", "key.pem", "server.KEY", "id_rsa", "id_ed25519.old", "netrc", "_netrc", "secrets.toml"),
    *("aws-credentials", "my_secret.txt", "service-account-7.json", "prod.env", "auth_token", "kubeconfig.yaml"),
]
INNOCENT = ["keys.csv", "monkey.npy", "tokens.txt", "environment.yml", "tokenizer.json", "secretary.csv", "pem.txt"]


def test_what_looks_like_credentials_stays_and_is_named_unless_it_was_asked_for_by_name(tmp_path: Path) -> None:
    path = study(tmp_path, "digits")
    (tmp_path / "data").mkdir()
    for name in (*SECRETS, *INNOCENT):
        (tmp_path / "data" / name).write_text("1")
    (tmp_path / "data" / "link.txt").symlink_to("id_rsa")
    sent = shipment(path, [tmp_path / "data"])
    assert set(sent.yours) == {f"{FOLDER}/study.toml", *(f"{FOLDER}/data/{name}" for name in INNOCENT)}
    assert sent.withheld == tuple(sorted(f"data/{name}" for name in [*SECRETS, "link.txt"]))
    sent = shipment(path, [tmp_path / "data", tmp_path / "data" / "key.pem"])
    assert f"{FOLDER}/data/key.pem" in sent.yours and "data/key.pem" not in sent.withheld


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (".env", "hidden files are not shipped"),
        ("env.txt", "hidden files are not shipped"),
        ("nothing", "there is no such file"),
        ("..", "legal: files and folders below"),
    ],
)
def test_what_may_not_be_included_is_refused(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / ".env").write_text("SECRET=1")
    (tmp_path / "env.txt").symlink_to(".env")
    with pytest.raises(InputError, match=says):
        shipment(study(tmp_path, "digits"), [tmp_path / name])


def test_canary_a_link_out_of_the_folder_carries_nothing_away(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("SECRET=1")
    path = study(tmp_path / "here", "digits")
    (path.parent / "innocent").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="legal: files and folders below"):
        shipment(path, [path.parent / "innocent"])


def test_a_linked_task_is_refused(tmp_path: Path) -> None:
    path = study(tmp_path / "here")
    small.write_task(tmp_path)
    (path.parent / "my_task.py").symlink_to(tmp_path / "my_task.py")
    with pytest.raises(InputError, match="symbolic link"):
        shipment(path)


def test_too_much_is_refused_with_the_largest(tmp_path: Path) -> None:
    path = study(tmp_path, "digits")
    with (tmp_path / "data.bin").open("wb") as file:
        file.truncate(600_000_000)
    with pytest.raises(InputError, match=r"data.bin 600 MB.*legal: 500 MB"):
        shipment(path, [tmp_path / "data.bin"])


def test_another_text_is_another_digest(tmp_path: Path) -> None:
    path = study(tmp_path)
    small.write_task(tmp_path)
    before = shipment(path).digest
    assert shipment(path).digest == before
    (tmp_path / "blobs.py").write_text((tmp_path / "blobs.py").read_text() + "\n")
    assert shipment(path).digest != before
