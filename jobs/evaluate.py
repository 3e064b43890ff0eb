"""`ray job submit … -- python jobs/evaluate.py OPTIONS` runs `raydet evaluate OPTIONS` on the cluster."""

from raydet.cli.main import run_job

run_job("evaluate")
