"""`ray job submit … -- python jobs/inspect_data.py OPTIONS` runs `raydet inspect OPTIONS` on the cluster."""

# Not named inspect.py, which would shadow the module `inspect` of the standard library.

from raydet.cli.main import run_job

run_job("inspect")
