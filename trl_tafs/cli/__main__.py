"""`python -m trl_tafs.cli`."""

import sys

from trl_tafs.cli.main import main

sys.exit(main())
