"""`ray job submit … -- python jobs/tune.py OPTIONS` runs `raydet tune OPTIONS` on the cluster."""

from raydet.cli.main import run_job

run_job("tune")
