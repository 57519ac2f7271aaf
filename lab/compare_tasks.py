"""The tasks that only the comparison needs; its worker loads them with ``--include lab.compare_tasks``."""

from functools import cached_property
from typing import Any

from celery import Task

from tasks import add, app

EXPIRES = 5  # seconds; long enough to be seen before


class OutOfStock(Exception):
    """A custom exception that survives JSON: super().__init__ gets exactly the constructor's arguments."""

    def __init__(self, product: str, left: int) -> None:
        super().__init__(product, left)
        self.product, self.left = product, left

    def __str__(self) -> str:
        """Say how many are left."""
        return f"only {self.left} of {self.product} left"


@app.task(throws=(OutOfStock,))
def order(product: str, count: int) -> int:
    """Order more than there is: the result is an exception of the project's own."""
    if count > 2:
        raise OutOfStock(product, 2)
    return count


@app.task(bind=True)
def add_by_another(self: "Task[..., Any]", x: float, y: float) -> Any:
    """Hand over to another task, whose result becomes the result of this one."""
    return self.replace(add.s(x, y))


@app.task
def document(size: int) -> str:
    """Return a text of that many characters."""
    return "x" * size


class ShortLived(Task):  # type: ignore[type-arg]
    """A task whose result expires after EXPIRES seconds, whatever result_expires says."""

    @cached_property
    def backend(self) -> Any:
        """A result backend like the app's, with another expiry."""
        app: Any = self.app
        backend = app._get_backend()
        backend.expires = EXPIRES
        return backend


@app.task(base=ShortLived)
def add_short_lived(x: float, y: float) -> float:
    """Return x + y, for a moment."""
    return x + y
