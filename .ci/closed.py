#!/usr/bin/env python3
"""Look at the running stack as a stranger on this machine does: ports, logins, containers, logs and images.

  .ci/closed.py default    docker compose up without .env
  .ci/closed.py env        passwords that need escaping, from .env; then a changed one with the old volume
  .ci/closed.py files      the same passwords, from files
  .ci/closed.py tls        the same with TLS alone
  .ci/closed.py cluster    three nodes of each server, with TLS and passwords from files

.ci/run sets the variables that give the stack a name and ports of its own.
"""

import base64
import http.client
import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

COMPOSE = ["docker", "compose"]
TIMEOUT = 300.0  # seconds that a command may take
PAGES = {"flower": os.environ.get("FLOWER_PORT", "5555"), "rabbitmq": os.environ.get("RABBITMQ_PORT", "15672")}
SERVERS = ("rabbitmq", "redis", "sentinel")  # and -2, -3 in the cluster; started as root by their images, which drop it
# Every character that a URL, a shell, a JSON or a .env file could take for its own, and each password another.
PASSWORDS = {name: f'{name}Begins p@ss:q/o%z#d,$y"z\\ ends{name}' for name in ("rabbitmq", "redis", "flower")}

SCAN = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def is_open(target):
    try:
        socket.create_connection(target, timeout=2).close()
    except OSError:
        return False
    return True
targets = json.loads(sys.argv[1])
print(json.dumps([target for target, found in zip(targets, ThreadPoolExecutor(64).map(is_open, targets)) if found]))
"""


def say(line: str) -> None:
    """Print what has been looked at."""
    print(f"   {line}", flush=True)


def run(*command: str, code: int | None = 0) -> str:
    """Run a command and return what it prints. Raises AssertionError when it ends with another exit code."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT, check=False)
    output = done.stdout.decode(errors="replace")
    assert code is None or done.returncode == code, f"{command} ended with {done.returncode}:\n{output}"
    return output


def compose(*arguments: str, code: int | None = 0) -> str:
    """Run docker compose."""
    return run(*COMPOSE, *arguments, code=code)


def use(*files: str) -> None:
    """Use these Compose files, as far as they are there."""
    COMPOSE.extend(f"--file={file}" for file in files if Path(file).exists())


def up() -> None:
    """Start the demo and wait until its tour has ended as announced."""
    compose("up", "--detach", "--build")
    code = producer_exit_code()
    assert code == 0, f"the producer's exit code is {code}"


def producer_exit_code() -> int:
    """Wait until the tour has ended."""
    return int(run("docker", "wait", compose("ps", "--all", "--quiet", "producer").strip()))


def containers() -> dict[str, Any]:
    """Return what docker inspect says of each service's container."""
    inspected = json.loads(run("docker", "inspect", *compose("ps", "--all", "--quiet").split()))
    return {container["Config"]["Labels"]["com.docker.compose.service"]: container for container in inspected}


def status(service: str, login: str, trust: ssl.SSLContext | None = None) -> int:
    """Return the HTTP status with which a published page answers, over TLS if an authority is trusted."""
    connection = http.client.HTTPConnection("127.0.0.1", int(PAGES[service]), timeout=10)
    if trust:
        connection = http.client.HTTPSConnection("127.0.0.1", connection.port, timeout=10, context=trust)
    path = {"flower": "/workers", "rabbitmq": "/api/whoami"}[service]
    headers = {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


# --- What must hold however the passwords are given -------------------------------------------------------


def check_ports(found: dict[str, Any]) -> None:
    """Only two pages are published, on 127.0.0.1; from outside the stack's networks nothing can be reached."""
    published = {
        (service, port): {binding["HostIp"] for binding in bindings}
        for service, container in found.items()
        for port, bindings in container["NetworkSettings"]["Ports"].items()
        if bindings
    }
    assert published == {("flower", "5555/tcp"): {"127.0.0.1"}, ("rabbitmq", "15672/tcp"): {"127.0.0.1"}}, published
    addresses = [
        network["IPAddress"]
        for container in found.values()
        for network in container["NetworkSettings"]["Networks"].values()
        if network["IPAddress"]
    ]
    inside = (4369, 5555, 5671, 5672, 6379, 15671, 15672, 15692, 25672)
    targets = json.dumps([(address, port) for address in addresses for port in inside])
    assert len(json.loads(compose("exec", "-T", "worker", "python", "-c", SCAN, targets))) >= 4, "the scan is blind"
    host = run("docker", "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}").strip()
    targets = json.dumps([*json.loads(targets), *((host, port) for port in (*map(int, PAGES.values()), 5672, 6379))])
    image = found["worker"]["Image"]
    reached = json.loads(run("docker", "run", "--rm", "--network=bridge", image, "python", "-c", SCAN, targets))
    assert reached == [], reached
    say(f"ports: two pages on 127.0.0.1; {len(json.loads(targets))} others cannot be reached")


def check_logins(right: dict[str, str], trust: ssl.SSLContext | None = None) -> None:
    """Both pages ask for a login, and take the right one alone."""
    for service, login in right.items():
        wrong = ["", "guest:guest", "admin:admin", "demo:", "demo:wrong", ":"]
        answers = {attempt: status(service, attempt, trust) for attempt in (*wrong, login)}
        assert answers == {**dict.fromkeys(wrong, 401), login: 200}, (service, answers)
    say("logins: both pages refuse all but the right one")


def check_containers(found: dict[str, Any]) -> None:
    """Every container is read-only and limited, has no rights, and is not root."""
    for service, container in found.items():
        host, user = container["HostConfig"], container["Config"]["User"]
        closed = {
            "read-only": host["ReadonlyRootfs"] and not host["Privileged"],
            "without capabilities": host["CapDrop"] == ["ALL"]
            and (service.partition("-")[0] in SERVERS or not host["CapAdd"]),
            "without new privileges": "no-new-privileges:true" in (host["SecurityOpt"] or []),
            "limited": host["Memory"] > 0 and host["PidsLimit"] > 0,
            "not root": service.partition("-")[0] in SERVERS or user not in ("", "0", "root"),
        }
        if container["State"]["Running"]:
            lines = compose("exec", "-T", service, "cat", "/proc/1/status").splitlines()
            process = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            closed["a process without rights"] = (
                "0" not in process["Uid"].split()
                and int(process["CapEff"], 16) == int(process["CapPrm"], 16) == 0
                and process["NoNewPrivs"] == "1"
            )
        assert all(closed.values()), (service, closed)
    for service, setting in json.loads(compose("--profile=*", "config", "--format=json"))["services"].items():
        wanted = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
        assert {name: setting.get(name) for name in wanted} == wanted, service  # those that do not run, too
        assert int(setting["mem_limit"]) > 0 < setting["pids_limit"], service
    limits = "{maps:get(wal_max_size_bytes, ra_system:fetch(quorum_queues)), vm_memory_monitor:get_memory_limit()}."
    in_force = compose("exec", "-T", "rabbitmq", "rabbitmqctl", "--quiet", "eval", limits).strip()
    assert in_force == "{32000000,600000000}", in_force
    networks = list(found["redis"]["NetworkSettings"]["Networks"].values())
    assert len(networks) == 1, networks
    network = json.loads(run("docker", "network", "inspect", networks[0]["NetworkID"]))[0]
    assert network["Internal"], f"the network {network['Name']} has a way out"
    say(f"containers: {', '.join(sorted(found))} are closed; Redis has no way out")


def check_every_client(**wanted: str) -> None:
    """Each service of this project's image, also of those that do not run, has these variables, or none of them."""
    services = json.loads(compose("--profile=*", "config", "--format=json"))["services"]
    clients = {name: service["environment"] for name, service in services.items() if "RABBITMQ_URL" in str(service)}
    assert {"worker", "flower", "producer", "wire", "compare", "benchmark", "tests"} <= set(clients), clients
    for name, environment in clients.items():
        assert environment | wanted == environment, (name, environment)
    say(f"overlay: reaches {', '.join(sorted(clients))}")


def check_printed_commands() -> None:
    """What the tour says to type next uses the same Compose files."""
    logs = compose("logs", "--no-color", "--no-log-prefix", "producer")
    printed = re.findall(r"docker compose .*", logs[logs.index("What next?") :])
    files = " ".join(option.replace("--file=", "-f ") for option in COMPOSE if option.startswith("--file="))
    assert len(printed) >= 3, logs
    assert all(command.startswith(f"docker compose {files}".strip() + " ") for command in printed), printed
    say("the tour's last words: commands with the same files")


def secrets() -> list[bytes]:
    """Return parts of the passwords that stay the same in URLs, JSON, YAML, and how basic authentication sends them."""
    parts = ["q/o%z", quote("q/o%z", safe="")]
    for name, password in PASSWORDS.items():
        parts += [f"{name}Begins", f"ends{name}", base64.b64encode(f"demo:{password}".encode()).decode()]
    return [part.encode() for part in parts]


def check_nothing_shows(found: dict[str, Any], *more: str) -> None:
    """No log, no image layer, and none of the other texts has a password in it."""
    image = found["worker"]["Image"]
    stopped = run("docker", "create", image).strip()
    try:
        files = subprocess.run(
            ["docker", "export", stopped], stdout=subprocess.PIPE, timeout=TIMEOUT, check=True
        ).stdout
    finally:
        run("docker", "rm", stopped)
    places = {
        "logs": compose("logs", "--no-color").encode(),
        "history": run("docker", "history", "--no-trunc", image).encode(),
        "image": run("docker", "image", "inspect", image).encode(),
        "files": files,
        **{f"text {number}": text.encode() for number, text in enumerate(more, 1)},
    }
    assert b"demo:**@" in places["logs"], "the logs have no masked URL: were they read?"
    assert b"result_backend" in files
    shown = [(place, secret) for place, text in places.items() for secret in secrets() if secret in text]
    assert not shown, shown
    say(f"passwords: in none of {', '.join(places)}")


# --- Ways to start it -------------------------------------------------------------------------------------


def default() -> None:
    """Without .env: the passwords are demo."""
    up()
    found = containers()
    check_ports(found)
    check_logins({"flower": "demo:demo", "rabbitmq": "demo:demo"})
    check_containers(found)
    check_printed_commands()
    redis_cli = "export REDISCLI_AUTH=$(cat /run/admin/password); redis-cli --user admin"
    transaction = r"printf 'MULTI\nSET celery-demo:a 1\nSET celery-demo:b 2\nEXEC\n' > /tmp/transaction"
    compose("exec", "-T", "redis", "sh", "-c", f"{transaction}; {redis_cli} < /tmp/transaction")
    compose("restart", "--timeout", "5", "redis")
    compose("up", "--detach", "--wait", "redis")
    kept = compose("exec", "-T", "redis", "sh", "-c", f"{redis_cli} mget celery-demo:a celery-demo:b").split()
    assert kept == ["1", "2"], kept
    say("Redis: a transaction is still there after a restart")
    os.environ["RESULT_STORE"] = "memcached"
    compose("up", "--detach")
    assert producer_exit_code() == 1
    assert "RESULT_STORE is 'memcached', but it must be" in compose("logs", "--no-color", "producer")
    say("an unknown RESULT_STORE: the producer says so")


def env() -> None:
    """With passwords in .env; then with another one for RabbitMQ, and its old volume."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, ".env")
        file.write_text("".join(f"{name.upper()}_PASSWORD='{value}'\n" for name, value in PASSWORDS.items()))
        COMPOSE.append(f"--env-file={file}")
        up()
        found = containers()
        check_logins({service: f"demo:{PASSWORDS[service]}" for service in PAGES})
        check_nothing_shows(found)
        assert b"endsrabbitmq" in json.dumps(found).encode(), "the search is blind"
        file.write_text(file.read_text().replace("'rabbitmq", "'changed"))
        compose("up", "--detach")
        assert producer_exit_code() == 1
        for service in ("producer", "worker"):
            logs = compose("logs", "--no-color", service)
            assert "keeps the password of its first start" in logs, logs
            assert "rabbitmqctl change_password" in logs, logs
            assert not [secret for secret in secrets() if secret in logs.encode()]
        say("a changed password with the old volume: producer and worker say so")


def files() -> None:
    """With passwords in files, which neither docker compose config nor docker inspect shows."""
    with tempfile.TemporaryDirectory() as folder:
        for name, value in PASSWORDS.items():
            Path(folder, f"{name}_password").write_text(value + "\n")
        os.environ["SECRETS"] = folder
        use("docker-compose.yml", "lab/docker-compose.secrets.yml", "docker-compose.override.yml")
        up()
        found = containers()
        check_logins({service: f"demo:{PASSWORDS[service]}" for service in PAGES})
        check_containers(found)
        check_nothing_shows(found, compose("--profile=*", "config"), json.dumps(found))
        in_files = {f"{name}_PASSWORD_FILE": f"/run/secrets/{name.lower()}_password" for name in ("RABBITMQ", "REDIS")}
        check_every_client(RABBITMQ_PASSWORD="", REDIS_PASSWORD="", **in_files)
        check_printed_commands()


CONNECT = {
    "broker": "import tasks; tasks.app.connection_for_write().connect(); print('connected')",
    "result backend": "import tasks; tasks.app.backend.client.ping(); print('connected')",
}
REFUSED = {  # what is wrong, for whom, and what Celery says
    "authority": ("SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt", CONNECT, "self-signed certificate"),
    "broker's host name": ("RABBITMQ_URL=amqps://demo@{rabbitmq}:5671/demo", ["broker"], "Hostname mismatch"),
    "broker in plain text": ("RABBITMQ_URL=amqp://demo@rabbitmq:5671/demo", ["broker"], "closed connection"),
    "broker's old port": ("RABBITMQ_URL=amqp://demo@rabbitmq:5672/demo", ["broker"], "refused"),
    "Redis's host name": ("REDIS_URL=rediss://demo@{redis}:6379/0", ["result backend"], "Hostname mismatch"),
    "Redis in plain text": (
        "REDIS_URL=redis://demo@redis:6379/0",
        ["result backend"],
        "Connection reset|closed by server",
    ),
}


def tls() -> None:
    """With TLS alone: the tour with both stores; every side's certificate is verified, and plain text refused."""
    use("docker-compose.yml", "lab/docker-compose.tls.yml", "docker-compose.override.yml")
    up()
    found = containers()
    check_ports(found)
    check_containers(found)
    trust = ssl.create_default_context(cadata=compose("exec", "-T", "flower", "cat", "/run/tls/ca.pem"))
    check_logins({"flower": "demo:demo", "rabbitmq": "demo:demo"}, trust)
    check_every_client(
        RABBITMQ_URL="amqps://demo@rabbitmq:5671/demo",
        REDIS_URL="rediss://demo@redis:6379/0",
        SSL_CERT_FILE="/run/tls/ca.pem",
    )
    check_printed_commands()
    for service in PAGES:
        for context, refusal in ((None, http.client.HTTPException), (ssl.create_default_context(), ssl.SSLError)):
            try:
                status(service, "demo:demo", context)
            except (refusal, ConnectionResetError):
                continue
            raise AssertionError(f"{service} answers without TLS, or its certificate is not looked at")
    names = {service: container["Name"].lstrip("/") for service, container in found.items()}
    for what, (variable, clients, error) in {"nothing": ("A=1", CONNECT, "^connected"), **REFUSED}.items():
        for client in clients:
            command = ("-e", variable.format_map(names), "worker", "python", "-c", CONNECT[client])
            said = compose("exec", "-T", *command, code=0 if what == "nothing" else 1)
            assert re.search(error, said), (what, client, said)
    say(f"certificates: refused are a wrong {', '.join(REFUSED)}")
    os.environ["RESULT_STORE"] = "rabbitmq"
    up()
    say("the tour with the other store")


def cluster() -> None:
    """Three nodes of each server, with TLS and passwords from files: the tour with both stores."""
    with tempfile.TemporaryDirectory() as folder:
        for name, value in PASSWORDS.items():
            Path(folder, f"{name}_password").write_text(value + "\n")
        os.environ["SECRETS"] = folder
        overlays = ("cluster", "tls", "cluster.tls", "secrets")
        use(
            "docker-compose.yml",
            *(f"lab/docker-compose.{name}.yml" for name in overlays),
            "docker-compose.override.yml",
        )
        for store in ("redis", "rabbitmq"):
            os.environ["RESULT_STORE"] = store
            up()
            say(f"the tour with results in {store}")
        found = containers()
        assert {"rabbitmq-3", "redis-3", "sentinel-3"} <= set(found), found
        check_ports(found)
        check_containers(found)
        trust = ssl.create_default_context(cadata=compose("exec", "-T", "flower", "cat", "/run/tls/ca.pem"))
        check_logins({service: f"demo:{PASSWORDS[service]}" for service in PAGES}, trust)
        check_nothing_shows(found, compose("--profile=*", "config"), json.dumps(found))


if __name__ == "__main__":
    way = {"default": default, "env": env, "files": files, "tls": tls, "cluster": cluster}[sys.argv[1]]
    try:
        way()
    except AssertionError as exc:
        sys.exit(f".ci/closed.py {sys.argv[1]}: {exc}")
