"""`python -m dcjax`, the same as `dcjax`."""

import sys

from dcjax.cli import main

sys.exit(main())
