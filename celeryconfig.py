"""Celery settings: RabbitMQ is the broker, RESULT_STORE says where the results go.

Copy this file and the folder hardening/ beside your Celery app and call ``app.config_from_object("celeryconfig")``.
Then change the two names marked YOURS. The file reads these environment variables:

RESULT_STORE   redis (default) or rabbitmq
RABBITMQ_URL   amqp:// or amqps://, default amqp://guest:guest@localhost:5672//; for a cluster URL;URL;URL
REDIS_URL      redis://, rediss://, sentinel://, sentinels:// or redis+socket://, default redis://localhost:6379/0;
               only used by RESULT_STORE=redis
RABBITMQ_PASSWORD, REDIS_PASSWORD              a password in plain text, which is put into the URL
RABBITMQ_PASSWORD_FILE, REDIS_PASSWORD_FILE    the same, read from a file (/run/secrets/...)
REDIS_SENTINEL_PASSWORD, ..._FILE              the Sentinels' own password
SSL_CERT_FILE       with TLS, the certificate authority of your own servers
WORKER_READY_FILE   a file that the worker touches while it consumes: see hardening/readiness.py

Above each setting stands the reason for its value, then the result backend that it concerns
(redis, rabbitmq or both) and its documentation. A value that cannot work stops the process with one line.
"""

import ssl as _ssl

from hardening import delays as _delays
from hardening import environment as _environment
from hardening import hostnames as _hostnames
from hardening import publishing as _publishing

_store = _environment.result_store()
# Seconds between attempts to reach RabbitMQ, and the function that ends them.
_attempts = {"interval_start": 0, "interval_step": 0.2, "interval_max": 1, "errback": _publishing.within_limit}

# --- Broker -----------------------------------------------------------------------------------------------

# Tasks always travel through RabbitMQ, whichever store the results take.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-url
broker_url = _environment.service_url("RABBITMQ")

# With amqps://, check the certificate's host name, too: Celery on its own checks only that a trusted authority signed
# it. The certificate authority of your own servers goes into the standard variable SSL_CERT_FILE.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-use-ssl
_tls = {"cert_reqs": _ssl.CERT_REQUIRED, "server_hostname": _hostnames.OF_EACH_NODE}
broker_use_ssl = _tls if broker_url.startswith("amqps://") else False

# delay() returns when RabbitMQ has taken the message. Without this, a message lost on the way is lost in silence.
# Price, tasks a second: redis none, rabbitmq 19 %. Calls in a block of hardening.publishing.together() pay it once.
# Drop it if lost tasks do no harm. on_open bounds each wait for RabbitMQ; the rest bounds the first attempt to connect.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-transport-options
broker_transport_options = {
    "confirm_publish": True,
    "on_open": _publishing.on_open,
    "connect_retries_timeout": _publishing.LIMIT + 5,
    **_attempts,
}

# A worker keeps trying to reach RabbitMQ for as long as it is away. By default Celery gives up after 100 attempts.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-connection-max-retries
broker_connection_max_retries = None

# This many threads or greenlets of a process can queue at once; the next one waits. A connection is opened when it is
# needed. With Celery's default of 10, the eleventh would wait 40 seconds, not the 20 below, while RabbitMQ is away.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-pool-limit
broker_pool_limit = 200

# A quorum queue confirms a message once it is on disk, in a cluster on two of three nodes. The name is YOURS, and not
# Celery's default "celery": a queue of that name may already exist with another type, and RabbitMQ refuses to change
# it (PRECONDITION_FAILED). Queues named with -Q are of the same kind. Its exchange has no name, so nothing is declared
# that an older version declared differently. Queues of your own must say that they are quorum:
#   task_queues = [Queue("tasks", queue_arguments={"x-queue-type": "quorum"}), Queue("mail", queue_arguments=...)]
# Name them after the kind of task, not after a node: task_routes = {"jobs.mail_*": {"queue": "mail"}}.
# apply_async(priority=0 to 31) needs no setting: a quorum queue refuses task_queue_max_priority.
# Price, tasks a second: redis 13 %, rabbitmq none. With confirm_publish it is more than the sum: 37 % and 44 %.
# Classic queues will do with one RabbitMQ, but they count no deliveries: a task that kills its worker circles for ever.
# both - https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/rabbitmq.html#using-quorum-queues
task_default_queue = "tasks"
task_default_queue_type = "quorum"
task_default_exchange = ""
task_create_missing_queue_type = "quorum"

# --- Tasks ------------------------------------------------------------------------------------------------

# Acknowledge a task after it has run, not before: if its worker dies, another worker gets it. A task may
# therefore run twice; write it so that this does no harm. Turn this off for tasks that must not run twice.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-acks-late
task_acks_late = True

# When a pool process is killed mid-task (out of memory, kill -9), run the task again as a retry: it counts
# against max_retries, so a task that kills its process each time ends as a WorkerLostError instead of circling
# for ever. If the retry cannot be sent, the message goes back to the queue.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-retry-on-worker-lost
task_retry_on_worker_lost = True
task_reject_on_worker_lost = True

# Keep trying to publish for 20 seconds, while RabbitMQ restarts, does not answer or blocks publishers. Then the call
# raises OperationalError: errback does that, before the attempts are used up.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-publish-retry-policy
task_publish_retry_policy = {"max_retries": 60, **_attempts}

# JSON only: whoever can write to a queue could run code in any worker or client that accepts pickle.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#accept-content
accept_content = ["json"]

# --- Worker -----------------------------------------------------------------------------------------------

# Refuses messages that are no task, with one log line; parks countdowns in RabbitMQ; tells if the worker consumes.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-consumer
if broker_url != "memory://":  # tests in one process: docs/copy-it.md
    worker_consumer = _delays.CONSUMER

# Each process holds one task and reserves no more, so that an idle worker finds work and a dead one holds back little.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-prefetch-multiplier
worker_prefetch_multiplier = 1

# Seconds. When the network is cut or a machine loses power, no connection is closed: worker and RabbitMQ each notice
# within two of these intervals that the other is gone. Celery's default is 120.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-heartbeat
broker_heartbeat = 10

# SIGTERM waits for the running tasks. SIGQUIT, or SIGTERM with REMAP_SIGTERM=SIGQUIT, waits this many seconds,
# then puts what still runs back on the queue.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-soft-shutdown-timeout
worker_soft_shutdown_timeout = 10.0

# When the connection to RabbitMQ is lost, let running tasks finish: their results count, although RabbitMQ delivers the
# tasks again. Stopping them (True) leaves some of them revoked for good when results go through RabbitMQ too.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-cancel-long-running-tasks-on-connection-loss
worker_cancel_long_running_tasks_on_connection_loss = False

# --- Results ----------------------------------------------------------------------------------------------

# One key a task in Redis, or one message a result on the caller's own reply queue in RabbitMQ.
# To go back to Celery's own backends, use _redis_url or "rpc://" instead.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#result-backend
_redis_url = _environment.service_url("REDIS") if _store == "redis" else ""
if _redis_url.startswith("sentinel"):
    result_backend = f"hardening.sentinel.SentinelBackend+{_redis_url}"
elif _redis_url:
    result_backend = f"hardening.redis.RedisBackend+{_redis_url.removeprefix('redis+')}"
elif _store == "rabbitmq":
    result_backend = "hardening.replies.ReplyQueueBackend"
else:  # tests in one process
    result_backend = "cache+memory://"

# With rediss:// and sentinels://, check the server's certificate and host name (SSL_CERT_FILE as above).
# redis - https://docs.celeryq.dev/en/stable/userguide/configuration.html#redis-backend-use-ssl
_redis_tls = _redis_url.startswith(("rediss://", "sentinels://"))
redis_backend_use_ssl = {"ssl_cert_reqs": _ssl.CERT_REQUIRED} if _redis_tls else None

# Seconds until an unread result is removed, so that neither store fills up. Celery's default is a day.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#result-expires
result_expires = 3600

# The counter of a chord's finished parts must outlive the slowest chord. Unless this is set, it expires like a result.
# redis - https://docs.celeryq.dev/en/stable/userguide/configuration.html#result-chord-expires
result_chord_expires = 86400

# Keep the task's name, arguments and retries beside the result, for whoever finds the key later.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#result-extended
result_extended = True

# Results on the reply queue survive a restart of RabbitMQ.
# rabbitmq - https://docs.celeryq.dev/en/stable/userguide/configuration.html#result-persistent
result_persistent = True

# Every key starts with this name, which is YOURS, so that several projects can share one Redis and one ACL rule covers
# all the keys. A full Redis (maxmemory, with noeviction) is treated like one that is away: the worker waits until there
# is room, and no result is lost.
# redis - https://docs.celeryq.dev/en/stable/userguide/configuration.html#result-backend-transport-options
result_backend_transport_options = {
    "global_keyprefix": "celery-demo:",
    "additional_connection_errors": ["redis.exceptions.OutOfMemoryError"],
    **_environment.sentinel_options(_redis_url),
}

# Seconds. Notice that a Redis is gone instead of waiting two minutes for its answer.
# redis - https://docs.celeryq.dev/en/stable/userguide/configuration.html#redis-socket-timeout
redis_socket_connect_timeout = 2.0
redis_socket_timeout = 5.0
redis_socket_keepalive = not _redis_url.startswith("redis+socket://")

# The celery command takes some variables as its own and lets them override this file, in some processes only.
_environment.refuse_overrides(globals())
