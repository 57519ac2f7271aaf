"""The list for the reviewer in docs/copy-it.md is complete, and says what Celery and celeryconfig.py say."""

import ast
import re

from celery.app.defaults import DEFAULTS
from celery.backends.redis import RedisBackend

from hardening import TESTED_WITH
from tests.conftest import Stack
from tests.pages import COPY_IT

ROWS = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| .+ \|$", COPY_IT, re.MULTILINE)


def test_each_value_is_the_installed_celerys_and_the_files(redis_stack: Stack) -> None:
    config = vars(redis_stack.load("celeryconfig"))
    assert len(ROWS) > 20
    for name, celerys, ours in ROWS:
        for cell, value in ((celerys, DEFAULTS.get(name)), (ours, config[name])):
            if cell.startswith("`") and not cell.startswith("`R"):
                assert ast.literal_eval(cell.strip("`")) == value, f"{name}: {cell}"


def test_no_setting_is_left_out_and_none_is_too_many(redis_stack: Stack) -> None:
    config = vars(redis_stack.load("celeryconfig"))
    names = {name for name in config if not name.startswith("_")}
    changed = {name for name in names if config[name] != DEFAULTS.get(name)}
    listed = {row[0] for row in ROWS}
    assert (changed - listed, listed - names) == (set(), set()), "docs/copy-it.md, For the reviewer"


def test_the_page_pins_the_version_that_the_folder_is_tested_with() -> None:
    assert f"celery[redis]~={TESTED_WITH}.0" in COPY_IT


def test_a_key_without_a_prefix_is_stocks() -> None:
    assert RedisBackend.task_keyprefix == "celery-task-meta-"
