"""What celeryconfig.py reads from the environment: URLs, passwords and the result store, checked.

What Celery lacks: it does not check a URL, reads no password from a file, and lets environment variables of its own
override the settings, in some processes only.
What this does: a value that cannot work ends the process with one line that says how to fix it.
To go back: write the values into celeryconfig.py. For Celery 5.7.
"""

import os
import re
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

_HOST_PORT = r"([^:/?#;@\[\]]+|\[[\da-fA-F:.]+\])(:\d+)?"
_LOGIN = r"([^:/?#;@]*(:[^:/?#;@]*)?@)?"
_SERVICES = {  # what a URL must match, what it looks like, its default
    "RABBITMQ": (
        rf"amqps?://{_LOGIN}{_HOST_PORT}(/[^?#;@]*)?",
        "amqp://USER:PASSWORD@HOST:PORT/VHOST (amqps:// for TLS; several of them, for the nodes of a cluster, with ; "
        "between them)",
        "amqp://guest:guest@localhost:5672//",
    ),
    "REDIS": (
        rf"(rediss?://{_LOGIN}{_HOST_PORT}(/\d*)?(\?[^#@;]*)?"
        rf"|sentinels?://{_LOGIN}{_HOST_PORT}(;{_HOST_PORT})*(/\d*)?(\?master=[\w.-]+)?"
        rf"|redis\+socket://{_LOGIN}/[^?#;@]+(\?virtual_host=\d+)?)",
        "redis://USER:PASSWORD@HOST:PORT/0 (rediss:// for TLS; sentinel://USER:PASSWORD@HOST:PORT;HOST:PORT/0 for "
        "Sentinels, sentinels:// with TLS; redis+socket:///PATH)",
        "redis://localhost:6379/0",
    ),
}


file: dict[str, Any] = {}  # the names in celeryconfig.py, for in_force.py


def stop(problem: str) -> NoReturn:
    """End the process with one line: around any other exception the celery command prints a traceback."""
    raise SystemExit(f"celeryconfig: {problem}")


def password(service: str) -> str | None:
    """Return the password in SERVICE_PASSWORD, or in the file that SERVICE_PASSWORD_FILE names, or None."""
    given, path = os.environ.get(f"{service}_PASSWORD"), os.environ.get(f"{service}_PASSWORD_FILE")
    if not path:
        return given
    if given:
        stop(f"{service}_PASSWORD and {service}_PASSWORD_FILE are both set: unset one of them.")
    try:
        secret = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as exc:
        stop(f"{service}_PASSWORD_FILE names {path}, which cannot be read: {getattr(exc, 'strerror', 'no UTF-8')}.")
    return secret or stop(f"{service}_PASSWORD_FILE names {path}, which is empty.")


def service_url(service: str) -> str:
    """Return RABBITMQ_URL or REDIS_URL, checked, with the service's password in it.

    For the nodes of a cluster it is a list of URLs with ; between them, the form that kombu and Celery take; the
    Sentinels' names get one each. A malformed one ends the process; the message does not show it, for the password's
    sake.
    """
    pattern, form, default = _SERVICES[service]
    url = os.environ.get(f"{service}_URL") or default
    if (service, url) == ("RABBITMQ", "memory://"):  # a broker inside the process, for tests
        return url
    urls = url.split(";") if service == "RABBITMQ" else [url]
    same = {(scheme, rest.partition("/")[2]) for scheme, _, rest in (one.partition("://") for one in urls)}
    if len(same) > 1 or not all(re.fullmatch(pattern, one, re.ASCII) for one in urls):
        _malformed(service, form)
    scheme, _, rest = url.partition("://")
    if scheme in ("sentinel", "sentinels"):
        names, _, end = rest.partition("/")
        with_port = [name if re.search(r":\d+$", name) else f"{name}:26379" for name in names.split(";")]
        urls = [f"{scheme}://{name}/{end}" for name in with_port]
    try:
        if any(urlsplit(one).port == 0 for one in urls):
            _malformed(service, form)
    except ValueError:  # above 65535
        _malformed(service, form)
    if secret := password(service):  # Celery reads the first Sentinel's, and hides no other
        count = 1 if service == "REDIS" else len(urls)
        urls[:count] = [_with_password(one, secret) for one in urls[:count]]
    return ";".join(urls)


def _malformed(service: str, form: str) -> NoReturn:
    stop(
        f"{service}_URL is malformed. It must look like {form}. Write @ : / % # ? ; in the password "
        f"as %40 %3A %2F %25 %23 %3F %3B, or give the password in {service}_PASSWORD."
    )


def _with_password(url: str, secret: str) -> str:
    scheme, _, rest = url.partition("://")
    login, _, where = rest.rpartition("@")
    return f"{scheme}://{login.partition(':')[0]}:{quote(secret, safe='')}@{where}"


def sentinel_options(redis_url: str) -> dict[str, Any]:
    """Return Celery's result_backend_transport_options for the Sentinels in a URL, and nothing for any other URL.

    The master's name is ?master= at its end, or Sentinel's own default. The Sentinels' password is
    REDIS_SENTINEL_PASSWORD, or in the file that REDIS_SENTINEL_PASSWORD_FILE names.
    """
    parts = urlsplit(redis_url.rpartition(";")[2])
    if parts.scheme not in ("sentinel", "sentinels"):
        return {}
    tls = {"ssl": True, "ssl_cert_reqs": "required"} if parts.scheme == "sentinels" else {}
    # One that does not answer, in seconds, so that the next one is asked.
    login = {
        "password": password("REDIS_SENTINEL"),
        "socket_timeout": 1.0,
        "socket_connect_timeout": 1.0,
        "retry": None,
    }
    return {"master_name": parts.query.rpartition("=")[2] or "mymaster", "sentinel_kwargs": {**login, **tls}}


def result_store() -> str:
    """Return RESULT_STORE: redis, which is the default, rabbitmq, or memory for tests. Any other ends the process."""
    store = os.environ.get("RESULT_STORE") or "redis"
    if store not in ("redis", "rabbitmq", "memory"):
        stop(f"RESULT_STORE is {store!r}, but it must be redis or rabbitmq.")
    return store


def refuse_overrides(settings: dict[str, Any]) -> None:
    """End the process when Celery's own variables, or its options -b and --result-backend, would win over the file.

    in_force.py compares with the file later.
    """
    global file
    file = settings
    broker_url, result_backend = settings.get("broker_url"), settings.get("result_backend")
    for name in ("BROKER_URL", "CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"):
        if os.environ.get(name) not in (None, "", broker_url):
            stop(
                f"{name} is set in the environment, or by the option -b, and overrides RABBITMQ_URL: "
                "unset it, and set RABBITMQ_URL."
            )
    for name in ("RESULT_BACKEND", "CELERY_RESULT_BACKEND"):
        if os.environ.get(name) not in (None, "", result_backend):
            stop(
                f"{name} is set in the environment, or by the option --result-backend, and overrides RESULT_STORE: "
                "unset it, and set RESULT_STORE=redis (with REDIS_URL) or RESULT_STORE=rabbitmq."
            )
