"""`ray job submit … -- python jobs/tune.py OPTIONS` does what `raydet tune OPTIONS` does."""

import sys

from raydet.cli.main import main

sys.exit(main(["tune", *sys.argv[1:]]))
