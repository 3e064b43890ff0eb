"""`ray job submit … -- python jobs/predict.py OPTIONS` does what `raydet predict OPTIONS` does."""

import sys

from raydet.cli.main import main

sys.exit(main(["predict", *sys.argv[1:]]))
