"""One line at the worker's start: which broker, result store and queues are in force, and what differs from the file.

What Celery lacks: app.conf.update() after celeryconfig.py silently overrides it, and the same settings in a settings
object (Django's, a dictionary) are silently overridden.
What this does: it names both kinds of settings, without their values, a serializer that nobody accepts, and a default
queue that nobody consumes from. URLs are shown without their passwords.
To go back: leave out worker_consumer, as delays.py says. For Celery 5.7.
"""

from collections.abc import Iterator, Mapping
from logging import INFO, WARNING
from typing import Any

from celery import Celery
from celery.app.defaults import SETTING_KEYS
from celery.utils.log import get_logger
from kombu.serialization import prepare_accept_content, registry  # type: ignore[attr-defined]
from kombu.utils.url import maybe_sanitize_url

from . import environment

logger = get_logger(__name__)


def say(app: Celery) -> None:
    """Log the line: as a warning when something is not as in the file."""
    logger.log(WARNING if any(differences(app).values()) else INFO, line(app))


def line(app: Celery) -> str:
    """Return the line. Without celeryconfig.py it says so."""
    queues = ", ".join(sorted(app.amqp.queues.consume_from))
    store = app.backend.as_uri(include_password=False) or maybe_sanitize_url(app.conf.result_backend)  # "django-db"
    broker = app.conf.broker_read_url or "amqp://"  # one, several with ; between, or a list of them
    urls = broker.split(";") if isinstance(broker, str) else broker
    parts = [f"In force: broker {';'.join(map(maybe_sanitize_url, urls))}, results in {store}, queues {queues}"]
    parts += [f"{title}: {', '.join(sorted(names))}" for title, names in differences(app).items() if names]
    return "; ".join(parts) + "."


def differences(app: Celery) -> dict[str, set[str]]:
    """Return the names of settings that are not in force or cannot work, by what is wrong with them."""
    file = {name: value for name, value in environment.file.items() if name in SETTING_KEYS}
    if not file:
        return {"without": {"celeryconfig.py"}}
    name_of_file = f"{environment.file['__name__'].rpartition('.')[2]}.py"
    accepted = {"task_serializer": app.conf.accept_content}
    accepted["result_serializer"] = app.conf.result_accept_content or app.conf.accept_content
    refused = {
        name
        for name, content in accepted.items()
        if registry.name_to_type.get(app.conf[name], app.conf[name]) not in (prepare_accept_content(content) or ())
    }
    changed = {name for name, value in file.items() if getattr(app.conf, name) != value}
    lost = {
        found
        for name, value in file.items()
        if name not in changed
        for found, other in _set_in(app, name)
        if other != value
    }
    return {
        f"not as in {name_of_file}": changed,
        f"without effect, for {name_of_file} wins": lost,
        "not in accept_content, so that messages are refused": refused,
        "not in task_queues, so that no worker runs its tasks": {app.conf.task_default_queue} - {*app.amqp.queues},
    }


def _set_in(app: Celery, name: str) -> Iterator[tuple[str, Any]]:
    """Yield each place's own spelling and value of a setting; the last place is Celery's defaults."""
    places: list[Mapping[str, Any]] = app.conf.maps[:-1]
    for place in places:
        for spelling in app.conf._to_keys(name):
            if spelling in place:
                yield spelling, place[spelling]
                break
