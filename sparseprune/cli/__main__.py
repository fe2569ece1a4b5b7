"""``python -m sparseprune.cli``."""

import sys

from . import main

sys.exit(main())
