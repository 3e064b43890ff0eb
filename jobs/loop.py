"""`ray job submit … -- python jobs/loop.py OPTIONS` runs `raydet loop OPTIONS` on the cluster."""

from raydet.cli.main import run_job

run_job("loop")
