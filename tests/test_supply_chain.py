"""What is installed is what the locks name, with hashes; base images have a tag."""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

import hardening
from lab.servers import ROOT

LOCKS = [lock for lock in (ROOT / "requirements.txt", ROOT / ".ci" / "requirements.txt") if lock.exists()]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: str(lock.relative_to(ROOT)))
def test_each_package_of_a_lock_has_one_version_and_hashes(lock: Path) -> None:
    packages = re.split(r"\n(?=\S)", lock.read_text())
    assert len(packages) > 20
    for package in packages:
        assert re.match(r"[a-z0-9-]+==[\w.]+( ;[^\\]+)? \\\n    --hash=sha256:[0-9a-f]{64}", package), package
    assert "://" not in lock.read_text()  # no index: that is the reader's own


def test_the_image_has_the_locked_packages_and_no_other() -> None:
    if sys.prefix != "/opt/venv":
        pytest.skip("not in the image")
    locked = dict(re.findall(r"^([a-z0-9-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    installed = {re.sub(r"[-_.]+", "-", item.metadata["Name"]).lower(): item.version for item in distributions()}
    assert "celery" in installed
    assert installed.items() <= locked.items()


def test_base_images_have_a_tag() -> None:
    images = re.findall(r"^FROM (\S+)", (ROOT / "worker" / "Dockerfile").read_text(), re.MULTILINE)
    for file in (ROOT / "docker-compose.yml", *(ROOT / "lab").glob("*.yml")):
        images += re.findall(r"^ +image: (\S+)", file.read_text(), re.MULTILINE)
    assert len(images) >= 5
    for image in images:
        assert re.fullmatch(r"[a-z-]+:\d[\w.-]*", image), image


def test_the_version_of_the_copied_files_is_that_of_the_changelog_and_of_the_image() -> None:
    changelog, project = (ROOT / "CHANGELOG.md").read_text(), (ROOT / "pyproject.toml").read_text()
    newest = re.search(r"^## ([\d.]+) - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    assert newest
    assert newest[1] == hardening.VERSION
    assert f'version = "{newest[1]}"' in project
    files = [ROOT / "docker-compose.yml", *(ROOT / "lab").glob("*.yml")]
    tags = {tag for file in files for tag in re.findall(r"celery-result-backends:(\S+)", file.read_text())}
    assert tags == {newest[1]}
