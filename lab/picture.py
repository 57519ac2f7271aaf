"""Draw what a command printed as an SVG picture of a terminal.

docker compose run --rm -T -e FORCE_COLOR=1 producer | python -m lab.picture > docs/tour.svg
"""

import io
import re
import sys

from rich.console import Console
from rich.text import Text

WIDTH = 112  # characters


def draw(printed: str, title: str) -> str:
    """Return the picture of a text with ANSI colours; longer lines are folded."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(printed))
    # No font from elsewhere: a page that shows the picture asks no other server.
    return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title), flags=re.DOTALL)


if __name__ == "__main__":
    print(draw(sys.stdin.read(), "docker compose up"))
