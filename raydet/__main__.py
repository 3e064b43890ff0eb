"""`python -m raydet` is the `raydet` command."""

import sys

from raydet.cli.main import main

sys.exit(main())
