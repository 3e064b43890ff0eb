"""`ray job submit … -- python jobs/predict.py OPTIONS` runs `raydet predict OPTIONS` on the cluster."""

from raydet.cli.main import run_job

run_job("predict")
