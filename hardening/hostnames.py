"""TLS to several RabbitMQ nodes, each with its own name in its certificate.

What Celery lacks: kombu writes the first node's name into broker_use_ssl, which all connections share, and checks the
other nodes' certificates against it. It also checks localhost's certificate against 127.0.0.1.
What this does: it replaces the transport of amqps://, and checks each connection against the name of its own node.
To go back: take "server_hostname" out of broker_use_ssl. For Celery 5.7.
"""

from typing import Any

from kombu.transport import TRANSPORT_ALIASES, pyamqp

OF_EACH_NODE = None  # broker_use_ssl["server_hostname"]


class Transport(pyamqp.SSLTransport):
    """kombu's amqps://, with a copy of the options for each connection."""

    def establish_connection(self) -> Any:
        """Connect to the node whose turn it is."""
        client: Any = self.client
        options, host = client.ssl, client.hostname
        if isinstance(options, dict) and options.get("server_hostname", host) is OF_EACH_NODE:
            client.ssl = {**options, "server_hostname": host}
        try:
            return super().establish_connection()
        finally:
            client.ssl, client.hostname = options, host


TRANSPORT_ALIASES["amqps"] = f"{__name__}:Transport"
