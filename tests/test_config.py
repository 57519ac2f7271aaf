"""celeryconfig.py: it works alone, knows only settings that Celery knows, and reads its variables safely."""

import json
import re
import ssl
import sys
import warnings
from pathlib import Path

import pytest
from celery import Celery
from celery.app.backends import by_url
from celery.app.defaults import SETTING_KEYS
from celery.exceptions import ImproperlyConfigured
from kombu.utils.url import maybe_sanitize_url, parse_url

from hardening.environment import sentinel_options
from lab.servers import ROOT, Worker, run
from tests.conftest import Stack, copy_settings

HARD_PASSWORD = "p@:/%# ;?&word"
PRINT_SETTINGS = "import celeryconfig, json; print(json.dumps({k: str(v) for k, v in vars(celeryconfig).items()}))"
CLEAN = dict.fromkeys(["RESULT_STORE", "RABBITMQ_URL", "REDIS_URL", "BROKER_URL", "RESULT_BACKEND"], "")


def _settings(**env: str) -> dict[str, str]:
    done = run(sys.executable, "-c", PRINT_SETTINGS, env={**CLEAN, **env})
    assert done.returncode == 0, done.stderr
    settings: dict[str, str] = json.loads(done.stdout)
    return settings


def _unknown_settings(source: str) -> set[str]:
    """Settings are set at the top level, or in an if at the top level."""
    names: set[str] = set()
    inside_function = False
    for line in source.splitlines():
        if re.match(r"(def|class|@)", line):
            inside_function = True
        elif re.match(r"\S", line):
            inside_function = False
        found = re.match(r"(?: {4})?([a-z]\w*) = ", line)
        if found and not inside_function:
            names.add(found[1])
    assert len(names) > 20
    return names - SETTING_KEYS


def test_celery_knows_every_setting() -> None:
    assert _unknown_settings((ROOT / "celeryconfig.py").read_text()) == set()


def test_a_misspelt_setting_is_found() -> None:
    source = (ROOT / "celeryconfig.py").read_text().replace("task_acks_late = True", "task_ack_late = True")
    assert _unknown_settings(source) == {"task_ack_late"}


def test_every_setting_has_a_scope_and_a_link() -> None:
    source = (ROOT / "celeryconfig.py").read_text()
    settings_part = source[source.index("# --- Broker") : source.index("# The celery command takes")]
    blocks = [block for block in settings_part.split("\n\n") if " = " in block]
    assert len(blocks) >= 20
    for block in blocks:
        assert re.search(r"^# (redis|rabbitmq|both) - https://docs\.celeryq\.dev/\S+#\S+$", block, re.MULTILINE), block


def test_without_variables_it_uses_redis_and_the_usual_local_servers() -> None:
    settings = _settings()
    assert settings["broker_url"] == "amqp://guest:guest@localhost:5672//"
    assert settings["result_backend"] == "hardening.redis.RedisBackend+redis://localhost:6379/0"


def test_result_store_switches_the_result_backend_and_nothing_else() -> None:
    redis, rabbitmq = _settings(RESULT_STORE="redis"), _settings(RESULT_STORE="rabbitmq")
    assert rabbitmq["result_backend"] == "hardening.replies.ReplyQueueBackend"
    different = {
        name
        for name in redis
        if redis[name] != rabbitmq[name] and not name.startswith("__") and " at 0x" not in redis[name]
    }
    assert different == {"result_backend", "_store", "_redis_url"}


@pytest.mark.parametrize("from_file", [False, True])
def test_a_password_of_its_own_is_escaped_and_never_shown(from_file: bool, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(HARD_PASSWORD + "\n")
    given = {"RABBITMQ_PASSWORD_FILE": str(secret)} if from_file else {"RABBITMQ_PASSWORD": HARD_PASSWORD}
    url = _settings(RABBITMQ_URL="amqp://demo:old@rabbitmq:5672/demo", **given)["broker_url"]
    assert url == "amqp://demo:p%40%3A%2F%25%23%20%3B%3F%26word@rabbitmq:5672/demo"
    with Celery(broker=url).connection_for_write() as connection:
        assert connection.password == HARD_PASSWORD
        assert "word" not in connection.as_uri()
    assert "word" not in maybe_sanitize_url(url)


def test_each_node_of_a_cluster_gets_the_password() -> None:
    nodes = "amqp://demo@mq1/demo;amqp://demo@mq2:5673/demo"
    url = _settings(RABBITMQ_URL=nodes, RABBITMQ_PASSWORD=HARD_PASSWORD)["broker_url"]
    with Celery(broker=url).connection_for_write() as connection:
        assert [parse_url(node)["password"] for node in connection.alt] == [HARD_PASSWORD] * 2
        assert [parse_url(node)["hostname"] for node in connection.alt] == ["mq1", "mq2"]


def test_sentinels_get_passwords_of_their_own() -> None:
    env = {"REDIS_PASSWORD": HARD_PASSWORD, "REDIS_SENTINEL_PASSWORD": "s3same"}
    settings = _settings(REDIS_URL="sentinels://demo@s1:26379;s2;s3/2?master=cache", **env)
    assert settings["result_backend"].startswith("hardening.sentinel.SentinelBackend+sentinels://demo:")
    assert settings["redis_backend_use_ssl"] == str({"ssl_cert_reqs": ssl.CERT_REQUIRED})
    url = settings["result_backend"].partition("+")[2]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("REDIS_SENTINEL_PASSWORD", "s3same")
        options = sentinel_options(url)
    app = Celery(backend=f"hardening.sentinel.SentinelBackend+{url}")
    app.conf.result_backend_transport_options = options
    pool = app.backend.client.connection_pool
    assert pool.service_name == "cache"
    assert (pool.connection_kwargs["password"], pool.connection_kwargs["db"]) == (HARD_PASSWORD, 2)
    sentinels = [one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels]
    assert [(one["host"], one["port"]) for one in sentinels] == [("s1", 26379), ("s2", 26379), ("s3", 26379)]
    assert {one["password"] for one in sentinels} == {"s3same"}
    assert "word" not in app.backend.as_uri()


def test_tls_urls_are_verified() -> None:
    settings = _settings(RABBITMQ_URL="amqps://demo@mq.example/demo", REDIS_URL="rediss://cache.example/0")
    assert settings["broker_use_ssl"] == str({"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": None})
    assert settings["redis_backend_use_ssl"] == str({"ssl_cert_reqs": ssl.CERT_REQUIRED})
    assert _settings()["broker_use_ssl"] == str(False)


def test_it_works_alone_in_a_package_of_another_project(stack: Stack, tmp_path: Path) -> None:
    """Copy celeryconfig.py into the package and hardening/ beside it, and fetch a result."""
    package = tmp_path / "shop"
    package.mkdir()
    copy_settings(tmp_path)
    (tmp_path / "celeryconfig.py").rename(package / "celeryconfig.py")
    (package / "__init__.py").touch()
    (package / "celery.py").write_text(
        "from celery import Celery\n"
        "app = Celery('shop')\n"
        "app.config_from_object('shop.celeryconfig')\n"
        "@app.task(name='double')\n"
        "def double(x):\n"
        "    return 2 * x\n"
    )
    with Worker(tmp_path / "alone.log", cwd=tmp_path, app="shop", env={**stack.env, "PYTHONPATH": ""}):
        client = "from shop.celery import double; print(double.delay(21).get(timeout=30))"
        done = run(sys.executable, "-c", client, cwd=tmp_path, env={**stack.env, "PYTHONPATH": ""})
        assert (done.stdout, done.returncode) == ("42\n", 0), done.stderr


def test_celery_report_lists_settings_alone_and_no_password() -> None:
    several = {"RABBITMQ_URL": "amqp://demo@mq1/v;amqp://demo@mq2/v", "REDIS_URL": "sentinel://demo@s1;s2/0"}
    secrets = {f"{name}_PASSWORD": "s3cret" for name in ("RABBITMQ", "REDIS", "REDIS_SENTINEL")}
    env = {**CLEAN, **several, **secrets}
    done = run(sys.executable, "-m", "celery", "-A", "tasks", "report", env=env)
    listed = set(re.findall(r"^(\w+): ", done.stdout.partition("settings -> ")[2], re.MULTILINE))
    assert done.returncode == 0, done.stderr
    assert len(listed) > 20
    assert listed <= SETTING_KEYS | {"deprecated_settings"}
    assert "s3cret" not in done.stdout


def test_celery_upgrade_settings_finds_nothing_to_change(tmp_path: Path) -> None:
    copy_settings(tmp_path)
    before = (tmp_path / "celeryconfig.py").read_text()
    done = run(sys.executable, "-m", "celery", "upgrade", "settings", "celeryconfig.py", cwd=tmp_path, env=CLEAN)
    assert "Does not seem to require any changes" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "celeryconfig.py").read_text() == before


# --- Every variable of docker-compose.yml stands in .env.example with its default -------------------------


def test_env_example_and_compose_agree() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    used = dict(re.findall(r"(?<!\$)\$\{(\w+):-([^}]*)\}", compose))
    assert set(re.findall(r"(?<!\$)\$\{?(\w+)", compose)) == set(used), "a variable without a default"
    example = (ROOT / ".env.example").read_text()
    assert dict(re.findall(r"^(\w+)=(.*)$", example, re.MULTILINE)) == used
    for name in used:
        assert re.search(rf"^#.+\n(#.+\n|\w+=.*\n)*{name}=", example, re.MULTILINE), f"{name} has no reason above it"


# --- From the old article to today: what the README says about it -----------------------------------------


def test_the_amqp_result_backend_is_gone() -> None:
    with pytest.raises(ImproperlyConfigured, match="Unknown result backend: 'amqp'"):
        by_url("amqp://guest:guest@localhost:5672//", Celery().loader)


def test_old_setting_names_alone_still_work() -> None:
    app = Celery()
    app.config_from_object({"BROKER_URL": "amqp://old", "CELERY_RESULT_BACKEND": "redis://old"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (app.conf.broker_url, app.conf.result_backend) == ("amqp://old", "redis://old")


def test_old_and_new_setting_names_must_not_be_mixed() -> None:
    app = Celery()
    app.config_from_object({"CELERY_RESULT_BACKEND": "redis://old", "task_acks_late": True})
    with pytest.raises(ImproperlyConfigured, match="Cannot mix new and old setting keys"):
        app.conf.task_acks_late  # noqa: B018


def test_celery_does_not_use_pika() -> None:
    code = "import sys; import tasks; tasks.app.connection().transport; print('pika' in sys.modules)"
    assert run(sys.executable, "-c", code, env=CLEAN).stdout == "False\n"
