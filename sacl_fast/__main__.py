"""``python -m sacl_fast`` is ``sacl-fast``; ``torchrun ... -m sacl_fast train`` uses it."""

import sys

from sacl_fast.cli import main

sys.exit(main())
