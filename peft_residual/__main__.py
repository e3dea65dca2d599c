"""`python -m peft_residual` is the command line `peft-residual`."""

import sys

from .cli import main


sys.exit(main())
