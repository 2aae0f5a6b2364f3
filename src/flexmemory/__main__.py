"""`python -m flexmemory`; also under torchrun."""

import logging
import os
import sys

from flexmemory.cli import main

if __name__ == "__main__":
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Threads of the communication library can abort a process whose interpreter is shutting down (docs/log.md).
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
