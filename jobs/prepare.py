"""`ray job submit … -- python jobs/prepare.py OPTIONS` runs `raydet prepare OPTIONS` on the cluster."""

from raydet.cli.main import run_job

run_job("prepare")
