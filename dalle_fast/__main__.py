"""``python -m dalle_fast`` is ``dalle-fast``."""

import sys

from dalle_fast.cli import main

sys.exit(main())
