"""What Celery lacks for the settings in celeryconfig.py: one module per gap. Copy and replace the folder as a whole.

Put it where your workers and clients can import it, beside celeryconfig.py. Nothing in it depends on the demo.
The first lines of each module say what Celery lacks, what the module does, and how to go back.
"""

import warnings

import celery

from . import compression  # noqa: F401

VERSION = "2.0.0"  # of the copied files: compare it with CHANGELOG.md
TESTED_WITH = "5.7"  # the minor version of Celery whose inner parts these modules use

if celery.__version__.rpartition(".")[0] != TESTED_WITH:
    warnings.warn(
        f"hardening {VERSION} is tested with Celery {TESTED_WITH}, and this is {celery.__version__}: "
        "run its tests, or take the modules of that version.",
        RuntimeWarning,
        stacklevel=2,
    )
