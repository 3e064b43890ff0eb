"""A short measurement here → time and cost of a job on a cluster."""
