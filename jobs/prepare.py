"""`ray job submit … -- python jobs/prepare.py OPTIONS` does what `raydet prepare OPTIONS` does."""

import sys

from raydet.cli.main import main

sys.exit(main(["prepare", *sys.argv[1:]]))
