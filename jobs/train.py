"""`ray job submit … -- python jobs/train.py OPTIONS` runs `raydet train OPTIONS` on the cluster."""

from raydet.cli.main import run_job

run_job("train")
