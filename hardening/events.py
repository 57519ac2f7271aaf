"""The worker sends its events, which Flower shows, together twice a second, not one by one.

What Celery lacks: its main process sends two or three messages for each task, one by one.
What this does: the worker sends one message every half second, with all events in it. They are not confirmed: see
Consumer.connection_for_write.
To go back: leave out worker_consumer, as delays.py says. For Celery 5.7.
"""

from typing import Any

from celery import bootsteps

FLUSH_INTERVAL = 0.5  # seconds
LIMIT = 1_000  # events; so many are sent at once, before the time has come


class EventsTogether(bootsteps.StartStopStep):
    """Takes over when the buffered events are sent."""

    requires = ("celery.worker.consumer.events:Events",)
    timer: Any = None

    def start(self, consumer: Any) -> None:
        """Begin with each connection to RabbitMQ. Celery buffers events if it has its event loop (prefork)."""
        dispatcher = consumer.event_dispatcher
        if dispatcher and consumer.hub:
            dispatcher.on_send_buffered, dispatcher.buffer_limit = None, LIMIT
            self.timer = consumer.timer.call_repeatedly(FLUSH_INTERVAL, dispatcher.flush)

    def stop(self, consumer: Any) -> None:
        """Send what there is; without a connection, it is kept for the next one."""
        if self.timer:
            self.timer.cancel()
        self.shutdown(consumer)

    def shutdown(self, consumer: Any) -> None:
        """Send the events of the tasks that the stopped worker has waited for."""
        if consumer.event_dispatcher:
            consumer.event_dispatcher.flush()
