"""`ray job submit … -- python jobs/evaluate.py OPTIONS` does what `raydet evaluate OPTIONS` does."""

import sys

from raydet.cli.main import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
