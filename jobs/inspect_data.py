"""`ray job submit … -- python jobs/inspect_data.py OPTIONS` does what `raydet inspect OPTIONS` does."""

# Not inspect.py: the folder of a script comes first in Python's search, before its own module `inspect`.

import sys

from raydet.cli.main import main

sys.exit(main(["inspect", *sys.argv[1:]]))
