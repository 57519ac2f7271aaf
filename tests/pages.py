"""The programs that a page shows, so that what is tested is what stands there."""

import re
from pathlib import Path

from lab.servers import ROOT

README = (ROOT / "README.md").read_text()
COPY_IT = (ROOT / "docs" / "copy-it.md").read_text()
UPGRADE = (ROOT / "docs" / "upgrade.md").read_text()


def program(name: str, page: str = README + COPY_IT) -> str:
    """Return the code that begins with its file's name in a comment."""
    found = re.findall(rf"^```python\n(# {re.escape(name)}\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"the page shows {name} {len(found)} times"
    return str(found[0])


def write(folder: Path, *names: str, page: str = README + COPY_IT) -> None:
    """Write programs of a page into the folder, under their names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(program(name, page))
