"""The tasks that only the comparison needs; its worker loads them with ``--include lab.compare_tasks``."""

from typing import Any

from celery import Task

from tasks import add, app


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
