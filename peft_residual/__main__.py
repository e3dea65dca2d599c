"""`python -m peft_residual` is the command line `peft-residual`, after an import of the package."""

import sys

from peft_residual_cli import main


sys.exit(main())
