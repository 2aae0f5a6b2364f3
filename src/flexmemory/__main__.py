"""`python -m flexmemory`."""

import sys

from flexmemory.cli import main

sys.exit(main())
