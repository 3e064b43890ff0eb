"""The Ray session, its shared storage, and the records of what a job did on it."""
