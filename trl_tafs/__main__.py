"""`python -m trl_tafs`."""

import sys

from trl_tafs.cli.main import main

sys.exit(main())
