"""The Ray cluster of a job: session, resource shares, tasks, settings, records, metrics and logs."""
