"""`ray job submit … -- python jobs/inspect_data.py OPTIONS` runs `raydet inspect OPTIONS` on the cluster."""

# Not inspect.py: Python would find it instead of its own module `inspect`.

from raydet.cli.main import run_job

run_job("inspect")
