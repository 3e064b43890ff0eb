"""`ray job submit … -- python jobs/train.py OPTIONS` does what `raydet train OPTIONS` does."""

import sys

from raydet.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
