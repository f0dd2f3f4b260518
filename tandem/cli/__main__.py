"""`python -m tandem.cli`, where the command `tandem` is not on the path."""

import sys

from tandem.cli import main

sys.exit(main())
